"""Logits shared out over two and three processes are learned as in one, to the bit where the order of addition is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded_runs
import torch
from safetensors.torch import load_file

from maskllm.optim import BLOCK
from maskllm.sharding import Shard

LEAN = {"state": "8bit", "step_in_backward": True, "clip_by": "weight", "checkpoint_activations": True, "regulariser": 0.0}


def case(name: str, build: str = "llama", processes: int = 2, **settings: Any) -> dict[str, Any]:
    """A step takes a micro-batch from each process, so that one process with as many micro-batches adds in the same order."""
    return {"name": name, "build": build, "settings": {"batch": processes, **settings}}


TWO = [
    case("noise", noise=True),
    case("patterns", noise=True, parametrization="patterns", hard=True),
    case("experts", "mixtral", noise=True),
    case("no-noise", noise=False),
    case("bf16", "mixtral", noise=True, bf16=True, checkpoint_activations=True),
    case("by-weight", noise=True, clip_by="weight"),
    {**case("first-half", noise=True), "stop": 2, "store": "half"},
    {**case("second-half", noise=True), "store": "half"},
    # These are not the same bits as in one process, or have none to be compared with.
    case("unclipped", noise=True, clip=0.0),
    case("summed", noise=True, clip=0.0, batch=4),
    case("lean", noise=False, **LEAN),
    {**case("lean-first-half", noise=False, **LEAN), "stop": 2, "store": "lean"},
    {**case("lean-second-half", noise=False, **LEAN), "store": "lean"},
]
THREE = [case("unclipped", noise=True, clip=0.0, processes=3), case("three-experts", "mixtral", noise=False, processes=3)]


def torchrun(processes: int, cases: list[dict[str, Any]], folder: Path) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, sharded_runs.__file__, str(folder / "cases.json"), str(folder)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, TWO, folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("one")
    torch.set_num_threads(threads)


def found(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def in_one(which: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    sharded_runs.run({"name": which["name"], "build": which["build"], "settings": which["settings"]}, folder, sharded=False)
    return found(folder, which["name"])


@pytest.mark.parametrize("name", ["unclipped"])
def test_two_processes_end_in_the_bits_of_one(name: str, two: Path, alone: Path) -> None:
    which = next(c for c in TWO if c["name"] == name)
    here, there = in_one(which, alone), found(two, name)
    assert here.keys() == there.keys()
    for key, value in here.items():
        if key not in ("losses", "norms"):  # means and norms, which are added up in another order
            assert torch.equal(value, there[key]), key
    torch.testing.assert_close(there["losses"], here["losses"], rtol=1e-6, atol=0)
    torch.testing.assert_close(there["norms"], here["norms"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["noise", "patterns", "experts", "no-noise", "bf16", "by-weight", "summed"])
def test_clipped_or_summed_they_differ_by_rounding(name: str, two: Path, alone: Path) -> None:
    which = next(c for c in TWO if c["name"] == name)
    here, there = in_one(which, alone), found(two, name)
    torch.testing.assert_close(there["losses"], here["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(there["norms"], here["norms"], rtol=1e-2, atol=0)
    masks = [key for key in here if key.startswith("mask/")]
    moved = sum(int((here[k] != there[k]).sum()) for k in masks)
    assert moved < 0.01 * sum(here[k].numel() for k in masks)


def test_three_processes_with_uneven_shares(tmp_path: Path, alone: Path) -> None:
    torchrun(3, THREE, tmp_path)
    for which in THREE:
        here, there = in_one(which, alone), found(tmp_path, which["name"])
        torch.testing.assert_close(there["losses"], here["losses"], rtol=1e-4, atol=0)
        masks = [key for key in here if key.startswith("mask/")]
        assert sum(int((here[k] != there[k]).sum()) for k in masks) < 0.01 * sum(here[k].numel() for k in masks)


@pytest.mark.parametrize(("whole", "half"), [("noise", ""), ("lean", "lean-")])
def test_a_checkpoint_is_gathered_and_handed_out_again(whole: str, half: str, two: Path) -> None:
    expected, resumed = found(two, whole), found(two, f"{half}second-half")
    first = found(two, f"{half}first-half")
    assert torch.equal(torch.cat([first["losses"], resumed["losses"]]), expected["losses"])
    for key, value in expected.items():
        if key not in ("losses", "norms"):
            assert torch.equal(resumed[key], value), key


def test_a_checkpoint_of_two_processes_goes_on_in_one(two: Path, tmp_path: Path) -> None:
    (two / "half").rename(tmp_path / "half")
    sharded_runs.run({**case("alone", noise=True), "store": "half"}, tmp_path, sharded=False)
    here, there = found(tmp_path, "alone"), found(two, "second-half")
    torch.testing.assert_close(here["losses"], there["losses"], rtol=1e-4, atol=0)


def test_lean_settings_learn_over_processes(two: Path, alone: Path) -> None:
    """One process steps in the backward pass of both sequences at once, so only nearly the same."""
    settings = {"batch": 2, "micro_batch": 2, "noise": False, **LEAN}
    here = in_one({"name": "lean", "build": "llama", "settings": settings}, alone)
    there = found(two, "lean")
    torch.testing.assert_close(there["losses"], here["losses"], rtol=2e-2, atol=0)
    assert there.keys() == here.keys()


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("rows", "row_logits"), [(1, 4), (7, 36), (64, 256), (100, 48), (33, 96)])
def test_shares_cover_every_row_once_and_begin_at_a_block(processes: int, rows: int, row_logits: int) -> None:
    unit = BLOCK // torch.tensor(row_logits).gcd(torch.tensor(BLOCK)).item()
    size = unit * -(-rows // (unit * processes))
    covered: list[int] = []
    for rank in range(processes):
        own = Shard(rows, size, rank, processes).own
        assert own.start * row_logits % BLOCK == 0 or own.start == rows
        covered += range(rows)[own]
    assert covered == list(range(rows))
