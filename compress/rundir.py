"""A run directory: what a run was asked to do, what it measured, its checkpoints and its result.

recipe.yaml      the recipe with every default filled in
metrics.jsonl    one JSON object a training step or measurement
state/           checkpoints, and what is already known before training (prior mask, baselines)
mask.safetensors, summary.json, report.html    the result, there only when the run is complete
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UsageError


@dataclass(frozen=True)
class RunDir:
    """The files of one run."""

    path: Path

    @classmethod
    def check(cls, path: Path, recipe_text: str, resume: bool) -> RunDir:
        """Whether a run may start in this folder (new or empty) or continue there; reads only, so it can come before slow work.

        Raises UsageError when there is a run and `resume` is not set, none and it is, the run there has another recipe, or it is
        complete.
        """
        run = cls(path)
        if run.recipe.exists():
            if not resume:
                raise UsageError(f"{path} already holds a run; continue it with --resume, or choose another --out")
            _same_recipe(run.recipe.read_text(encoding="utf-8"), recipe_text, path)
        elif resume:
            raise UsageError(f"{path} holds no run to resume; start it without --resume")
        elif path.exists() and (not path.is_dir() or any(p != _partial(run.recipe) for p in path.iterdir())):
            raise UsageError(f"{path} is not an empty folder; choose another --out")
        if run.summary.exists():
            raise UsageError(f"the run in {path} is complete; its result is in {run.summary}")
        return run

    def create(self, recipe_text: str) -> None:
        """Make the folder and put the recipe into it; a run that continues finds both."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.recipe.exists():  # first of all: a run that is killed before it has this can be started as if it had not been
            write_atomic(self.recipe, recipe_text)
        self.state.mkdir(exist_ok=True)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def prior(self) -> Path:
        return self.state / "prior.safetensors"

    @property
    def mask(self) -> Path:
        return self.path / "mask.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def append_metric(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; one cut off by a kill is left out."""
        if not self.metrics.exists():
            return []
        text = self.metrics.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def read_metrics_of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind."""
        return [record for record in self.read_metrics() if record["kind"] == kind]

    def rewind_metrics(self, step: int, kinds: tuple[str, ...]) -> None:
        """Drop what was recorded of these kinds after `step`: those steps run again."""
        kept = [r for r in self.read_metrics() if r["kind"] not in kinds or r["step"] <= step]
        write_atomic(self.metrics, "".join(json.dumps(r) + "\n" for r in kept))

    def known(self, name: str) -> Any:
        """What `know` saved under a name, or None."""
        file = self.state / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def know(self, name: str, value: Any) -> None:
        """Save a JSON value that a resumed run need not find out again."""
        write_atomic(self.state / f"{name}.json", json.dumps(value, indent=1))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it and rename it: under its own name it is whole or not there."""
    partial = _partial(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _same_recipe(before: str, now: str, path: Path) -> None:
    if before == now:
        return
    changed = [line.strip() for line in now.splitlines() if line not in before.splitlines()]
    raise UsageError(
        f"the run in {path} was started with another recipe; differs here: {'; '.join(changed[:5]) or 'keys were removed'}. "
        "Resume it with its own recipe, or choose another --out"
    )
