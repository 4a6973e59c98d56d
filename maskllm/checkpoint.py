"""Atomic checkpoints of a run: a folder a step, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from maskllm.errors import MaskError
from maskllm.safefile import Entry, sync_folder, write_safetensors


@dataclass(frozen=True)
class Checkpoint:
    """What `CheckpointStore.load` returns: the number of finished steps and the tensors."""

    step: int
    tensors: dict[str, Tensor]


@dataclass
class CheckpointStore:
    """Checkpoints under `folder`, the newest `keep` of them, for the run that `fingerprint` describes.

    A checkpoint is written under a temporary name, flushed to the disk and renamed, so a run killed at any moment leaves only
    whole ones. fingerprint: what a continuation must share with the run that saved it, as printable parts (model, data, recipe).
    """

    folder: Path
    fingerprint: dict[str, str]
    keep: int = 2

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write the checkpoint of `step` and drop the oldest beyond `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, final = self.folder / f"step-{step:08d}.partial", self.folder / f"step-{step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        # One tensor at a time: the safetensors library would first copy the whole state in memory.
        write_safetensors(partial / "state.safetensors", [Entry.of(k, v) for k, v in tensors.items()], {})
        with open(partial / "state.json", "w", encoding="utf-8") as file:
            json.dump({"step": step, "fingerprint": self.fingerprint}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        aside = self.folder / f"{final.name}.old"
        if final.exists():  # a folder cannot be replaced by another at once: until then the old one counts
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
        os.replace(partial, final)
        sync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint, or None. Raises MaskError when it was saved by a run with another fingerprint."""
        complete = self._complete()
        if not complete:
            return None
        newest = complete[-1]
        facts = json.loads((newest / "state.json").read_text())
        for part in sorted(self.fingerprint.keys() | facts["fingerprint"].keys()):
            ours, theirs = self.fingerprint.get(part), facts["fingerprint"].get(part)
            if ours != theirs:
                raise MaskError(
                    f"{newest} belongs to another run: its {part} is {theirs}, here it is {ours}; "
                    "use another --out, or the recipe it was started with"
                )
        with safe_open(newest / "state.safetensors", "pt") as file:
            return Checkpoint(facts["step"], {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118

    def _complete(self) -> list[Path]:
        """Whole checkpoints, oldest first; one that is being replaced (`.old`) before the one that replaces it."""
        found = (p for p in self.folder.glob("step-*") if p.suffix != ".partial")
        return sorted(found, key=lambda p: (p.stem, p.suffix != ".old"))
