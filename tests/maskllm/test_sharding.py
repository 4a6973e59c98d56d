"""Logits, and weights under them, shared out over two and three processes: learned as in one, to the bit where the order of addition is the same."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded_runs
import torch
from safetensors.torch import load_file
from torch import nn

from compress.device import multiplies
from maskllm.errors import MaskError
from maskllm.optim import BLOCK
from maskllm.parametrization import MaskState, MaskTarget, attach, own_parameter
from maskllm.patterns import Pattern
from maskllm.settings import LearnSettings
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
AGAIN = {"checkpoint_activations": True}
# Each with weights shared out and with logits alone, by the same settings; `weights_too` adds the former.
BOTH_OF_TWO = [
    case("w-noise", noise=True, **AGAIN),
    case("w-no-noise", noise=False, **AGAIN),
    case("w-patterns", noise=True, parametrization="patterns", hard=True, **AGAIN),
    case("w-experts", "mixtral", noise=True, **AGAIN),
    case("w-experts-no-noise", "mixtral", noise=False, state="bfloat16", batch=4, regulariser=0.0, **AGAIN),
    case("w-transposed", "gpt2", noise=True, **AGAIN),
    case("w-transposed-experts", "gpt_oss", noise=False, **AGAIN),
    case("w-bf16", noise=True, bf16=True, state="bfloat16", **AGAIN),
    case("w-lean", noise=True, **LEAN),
    case("w-unclipped", noise=True, clip=0.0, **AGAIN),
]
BOTH_OF_THREE = [
    case("w-noise", noise=True, processes=3, **AGAIN),
    case("w-experts", "mixtral", noise=False, state="bfloat16", regulariser=0.0, processes=3, **AGAIN),
]


def weights_too(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every case, and again with the frozen weights shared out."""
    return [*cases, *({**c, "name": f"{c['name']}-shared", "shard": "weights"} for c in cases)]


HALVES = [
    {**case("w-first-half", noise=True, **AGAIN), "stop": 2, "store": "w-half", "shard": "weights"},
    {**case("w-second-half", noise=True, **AGAIN), "store": "w-half", "shard": "weights"},
]


def torchrun(processes: int, cases: list[dict[str, Any]], folder: Path) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, sharded_runs.__file__, str(folder / "cases.json"), str(folder)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, [*TWO, *weights_too(BOTH_OF_TWO), *HALVES], folder)
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
    sharded_runs.run({"name": which["name"], "build": which["build"], "settings": which["settings"]}, folder, "none")
    return found(folder, which["name"])


def same_bits(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> None:
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert torch.equal(value, there[key]), key


def check_held(folder: Path, name: str, processes: int) -> None:
    """Each process holds its rows of every masked weight and no more, together all of them; in the end the network is what it was."""
    facts = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(processes)]
    assert all(fact["restored"] for fact in facts)
    logits = [value for key, value in found(folder, name).items() if key.startswith("logits/")]
    for rank, fact in enumerate(facts):
        expected = 0
        for value in logits:
            rows, row = math.prod(value.shape[:-2]), math.prod(value.shape[-2:])
            share = 256 // math.gcd(256, row)  # rows, in whole blocks of 256 logits
            share *= math.ceil(rows / (share * processes))
            expected += 4 * 4 * value.shape[-2] * max(0, min(share, rows - rank * share))
        assert fact["bytes"] == expected
    whole = json.loads((folder / f"{name.removesuffix('-shared')}.0.json").read_text())
    assert whole["restored"]
    assert sum(fact["bytes"] for fact in facts) == whole["bytes"]


@pytest.mark.parametrize("name", [c["name"] for c in BOTH_OF_TWO])
def test_shared_weights_change_no_bit(name: str, two: Path) -> None:
    """Of what is learned, of what is measured amid it with the final masks and without masks, and of the network afterwards."""
    same_bits(found(two, name), found(two, f"{name}-shared"))
    check_held(two, f"{name}-shared", 2)


def test_shared_weights_resume(two: Path) -> None:
    expected, first, resumed = found(two, "w-noise"), found(two, "w-first-half"), found(two, "w-second-half")
    resumed["losses"] = torch.cat([first["losses"], resumed["losses"]])
    resumed["norms"] = torch.cat([first["norms"], resumed["norms"]])
    same_bits(expected, resumed)


def test_shared_weights_of_two_processes_end_in_the_bits_of_one(two: Path, alone: Path) -> None:
    which = next(c for c in BOTH_OF_TWO if c["name"] == "w-unclipped")
    here, there = in_one(which, alone), found(two, "w-unclipped-shared")
    for key in here.keys() - {"losses", "norms"}:
        assert torch.equal(here[key], there[key]), key


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
    if name == "bf16" and not multiplies(torch.bfloat16, torch.device("cpu")):
        pytest.skip(
            "this processor has no instructions for bfloat16: how torch rounds its products there depends on how many rows there are"
        )
    which = next(c for c in TWO if c["name"] == name)
    here, there = in_one(which, alone), found(two, name)
    torch.testing.assert_close(there["losses"], here["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(there["norms"], here["norms"], rtol=1e-2, atol=0)
    masks = [key for key in here if key.startswith("mask/")]
    moved = sum(int((here[k] != there[k]).sum()) for k in masks)
    assert moved < 0.01 * sum(here[k].numel() for k in masks)


def test_three_processes_with_uneven_shares(tmp_path: Path, alone: Path) -> None:
    torchrun(3, [*THREE, *weights_too(BOTH_OF_THREE)], tmp_path)
    for which in BOTH_OF_THREE:
        same_bits(found(tmp_path, which["name"]), found(tmp_path, f"{which['name']}-shared"))
        check_held(tmp_path, f"{which['name']}-shared", 3)
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
    sharded_runs.run({**case("alone", noise=True), "store": "half"}, tmp_path, "none")
    here, there = found(tmp_path, "alone"), found(two, "second-half")
    torch.testing.assert_close(here["losses"], there["losses"], rtol=1e-4, atol=0)


def test_lean_settings_learn_over_processes(two: Path, alone: Path) -> None:
    """One process steps in the backward pass of both sequences at once, so only nearly the same."""
    settings = {"batch": 2, "micro_batch": 2, "noise": False, **LEAN}
    here = in_one({"name": "lean", "build": "llama", "settings": settings}, alone)
    there = found(two, "lean")
    torch.testing.assert_close(there["losses"], here["losses"], rtol=2e-2, atol=0)
    assert there.keys() == here.keys()


@pytest.mark.parametrize("contracted", [-1, -2])
def test_only_own_rows_go_to_the_device(contracted: int) -> None:
    """That of an accelerator is torch's meta device here, which has no values."""
    linear = nn.Linear(64, 128)
    target = MaskTarget("w", linear, "weight", contracted)
    rows, columns = (128, 64) if contracted == -1 else (64, 128)
    logits = {"w": torch.zeros(rows, columns // 4, 4)}
    state = MaskState(Pattern(2, 4), "scores", processes=2, rank=1, shard="weights")
    mask = attach([target], state, logits, torch.device("meta"))["w"]
    assert own_parameter(target).is_meta
    assert own_parameter(target).shape == (rows // 2, columns)
    assert mask.logits.is_meta
    assert mask.logits.shape == (rows // 2, columns // 4, 4)
    assert mask.home == torch.device("cpu")


def test_weights_are_shared_out_with_recomputation_alone() -> None:
    one = sharded_runs.learner("llama", LearnSettings(**sharded_runs.BASE), "none")
    accelerator = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))
    with pytest.raises(MaskError, match="with checkpoint_activations alone"):
        dataclasses.replace(one, accelerator=accelerator, shard="weights", settings=LearnSettings(**sharded_runs.BASE))


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
