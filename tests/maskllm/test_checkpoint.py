"""Checkpoints: whole or absent, the newest few, and only for the run that wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import maskllm.checkpoint
from maskllm.checkpoint import CheckpointStore
from maskllm.errors import MaskError

MARK = {"model": "m1", "data": "d1"}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"logits/a": torch.full((2, 3), value), "exp_avg/a": torch.full((3, 2), value).bfloat16().t()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "state", MARK).load() is None


def test_the_newest_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "state", MARK, keep=2)
    for step in (9, 10, 100):  # not in the order of their decimal strings
        store.save(step, tensors(step))
    assert names(store.folder) == ["step-00000010", "step-00000100"]
    loaded = CheckpointStore(store.folder, dict(MARK)).load()
    assert loaded is not None
    assert loaded.step == 100
    for key, value in tensors(100).items():
        assert torch.equal(loaded.tensors[key], value)
        assert loaded.tensors[key].dtype == value.dtype


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, MARK)
    store.save(1, tensors(1))
    store.save(1, tensors(2))
    loaded = store.load()
    assert loaded is not None
    assert torch.equal(loaded.tensors["logits/a"], tensors(2)["logits/a"])


@pytest.mark.parametrize(
    ("theirs", "part"),
    [
        ({"model": "m2", "data": "d1"}, "its model is m1, here it is m2"),
        ({**MARK, "recipe": "r"}, "its recipe is None, here it is r"),
    ],
)
def test_another_run_is_refused_by_the_part_that_differs(tmp_path: Path, theirs: dict[str, str], part: str) -> None:
    CheckpointStore(tmp_path, MARK).save(5, tensors(1))
    with pytest.raises(MaskError, match=part):
        CheckpointStore(tmp_path, theirs).load()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("victim", ["write_safetensors", "sync_folder", "os.replace"])
def test_a_run_killed_while_saving_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    store = CheckpointStore(tmp_path, MARK)
    store.save(1, tensors(1))

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if victim == "os.replace":
            patch.setattr(maskllm.checkpoint.os, "replace", die)
        else:
            patch.setattr(maskllm.checkpoint, victim, die)
        with pytest.raises(Killed):
            store.save(2, tensors(2))
    assert "step-00000002.partial" in names(tmp_path)
    loaded = store.load()
    assert loaded is not None
    assert loaded.step == 1
    store.save(2, tensors(2))  # and the next attempt is not disturbed
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("call", [1, 2])
def test_saving_a_step_again_never_leaves_it_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Killed before the old one is put aside, and between that and the new one's taking its place."""
    store = CheckpointStore(tmp_path, MARK, keep=1)
    store.save(1, tensors(1))
    renames = []
    replace = os.replace

    def die(a: Path, b: Path) -> None:
        renames.append(a)
        if len(renames) == call:
            raise Killed
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(maskllm.checkpoint.os, "replace", die)
        with pytest.raises(Killed):
            store.save(1, tensors(2))
    loaded = store.load()
    assert loaded is not None
    assert loaded.step == 1
    assert torch.equal(loaded.tensors["logits/a"], tensors(1)["logits/a"])
    store.save(1, tensors(3))
    store.save(2, tensors(4))
    assert names(tmp_path) == ["step-00000002"]
