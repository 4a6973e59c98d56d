"""Kill a mask-learning run with SIGKILL at random moments, resume it, and compare what it ends in with an uninterrupted run.

    python scripts/kill_and_resume.py [--times 20] [--kills 2] [KEY=VALUE]...

Each of the trials is killed `--kills` times and then left to finish. A kill comes at a random moment of the run's progress: as soon as a random
number of its steps is recorded, and a random part of a step later; after 0 steps is while the prior is found, after the last while the
result is written. Compared are the sha256 of the mask, and the record of every step (losses, gradient norm) but for the seconds. KEY=VALUE change the
recipe, a short one on the embedded tiny-llama that writes a checkpoint after every step: `learn.scope=block learn.block.steps=4`,
`learn.state=8bit`. Prints a table; exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHORT = [
    "learn.steps=12",
    "learn.batch=2",
    "learn.micro_batch=1",
    "learn.noise=true",
    "learn.warmup=0",
    "learn.learning_rate=0.02",
    "learn.save_minutes=1.0e-9",
    "data.sources=[{path: 'asset:wikitext2-valid', span: [0, 0.2]}]",
    "calibration.samples=8",
    "evaluate.texts.wikitext2.limit=4",
    "evaluate.baselines=[]",
    "evaluate.every=4",
    "evaluate.every_limit=2",
    "model.device=cpu",
]
KINDS = ("step", "block-step")  # the lines of metrics.jsonl that record a step


@dataclass
class Trial:
    """One run that was killed: where it stood each time, and what it ended in."""

    folder: Path
    kills: list[str] = field(default_factory=list)
    digest: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)

    def done(self) -> int:
        """Steps that are recorded now."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return sum(any(f'"kind": "{kind}"' in line for kind in KINDS) for line in lines)


def main() -> int:
    """Run the trials and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--times", type=int, default=20, help="trials")
    parser.add_argument("--kills", type=int, default=2, help="kills in each trial")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "compress", "learn-mask", arguments.recipe, *SHORT, *arguments.overrides, "--json"]
    print(shlex.join(command), file=sys.stderr)
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as scratch:
        whole = Trial(Path(scratch) / "uninterrupted")
        pace = finish(command, whole)
        print(f"uninterrupted: mask {whole.digest[:16]}, {len(whole.steps)} steps of {pace:.2f} s")
        print("| trial | killed at | mask | same mask | same steps |")
        print("| ---: | --- | --- | --- | --- |")
        different = 0
        for number in range(1, arguments.times + 1):
            trial = Trial(Path(scratch) / f"trial-{number}")
            for _ in range(arguments.kills):
                kill(command, trial, moments.uniform(trial.done(), len(whole.steps) + 1), pace)
            finish(command, trial)
            same = trial.digest == whole.digest, trial.steps == whole.steps
            different += not all(same)
            verdict = ["yes" if s else "NO" for s in same]
            print(f"| {number} | {'; '.join(trial.kills)} | {trial.digest[:16]} | {verdict[0]} | {verdict[1]} |", flush=True)
    print(f"{different} of {arguments.times} differ")
    return 1 if different else 0


def start(command: list[str], trial: Trial, log: Path) -> subprocess.Popen[str]:
    """Begin the trial's run, or go on with it."""
    resume = ["--resume"] if (trial.folder / "recipe.yaml").exists() else []
    with log.open("w") as errors:
        return subprocess.Popen([*command, "--out", str(trial.folder), *resume], stdout=subprocess.PIPE, stderr=errors, text=True)


def kill(command: list[str], trial: Trial, moment: float, pace: float) -> None:
    """Kill the run once it has recorded `moment` steps, the fraction taken of `pace` seconds; one that ends before is not killed."""
    if (trial.folder / "summary.json").exists():
        return
    log = trial.folder.with_suffix(".log")
    before = _newest(trial.folder)
    process = start(command, trial, log)
    while process.poll() is None and (_newest(trial.folder) == before or trial.done() < int(moment)):
        time.sleep(0.002)
    time.sleep(pace * (moment - int(moment)))
    if process.poll() is None:
        process.kill()
        process.wait()
        torn = any(path.name.endswith((".partial", ".old")) for path in trial.folder.rglob("*"))
        trial.kills.append(f"step {moment:.2f}{', amid a write' if torn else ''}")
    elif process.returncode:
        raise SystemExit(f"the run failed before it was killed:\n{log.read_text()[-4000:]}")


def finish(command: list[str], trial: Trial) -> float:
    """Let the run end; returns the seconds a step took, with its checkpoint. Reads mask and steps into the trial."""
    log = trial.folder.with_suffix(".log")
    if not (trial.folder / "summary.json").exists():
        process = start(command, trial, log)
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the run failed:\n{log.read_text()[-4000:]}")
        trial.digest = json.loads(out)["mask_sha256"]
    else:
        trial.digest = _saved_digest(trial.folder)
    lines = [json.loads(line) for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] in KINDS]
    trial.steps = [{k: v for k, v in line.items() if k != "seconds"} for line in steps]
    began, ended = (trial.folder / name for name in ("state/prior.safetensors", "summary.json"))
    return (ended.stat().st_mtime - began.stat().st_mtime) / len(steps)


def _saved_digest(folder: Path) -> str:
    """Of a run whose own output nobody read, as it ended just before it would have been killed."""
    from maskllm.storage import load_masks, mask_digest

    return mask_digest(load_masks(folder / "mask.safetensors").masks)


def _newest(folder: Path) -> float:
    """When the run wrote something last; 0 before it did."""
    watched = (folder / "recipe.yaml", folder / "metrics.jsonl", folder / "state")
    return max((path.stat().st_mtime for path in watched if path.exists()), default=0.0)


if __name__ == "__main__":
    sys.exit(main())
