"""Mask files as a user hands them in: `compress masks diff`, and masks read for a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_configs import llama
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import UsageError
from compress.masks import diff_masks, masks_of_model
from compress.weights import by_parameter, find_weights
from maskllm.errors import MaskError
from maskllm.patterns import Pattern
from maskllm.storage import save_masks, save_npz

P24 = Pattern(2, 4)
NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def random_mask(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return P24.best_of(torch.rand(shape, generator=torch.Generator().manual_seed(seed)))


def write(path: Path, masks: dict[str, torch.Tensor], pattern: Pattern = P24) -> Path:
    save_masks(path, masks, pattern, dict.fromkeys(masks, -1))
    return path


def test_differing_groups_are_counted_by_layer_and_kind(tmp_path):
    a = {name: random_mask((4, 16), seed) for seed, name in enumerate(NAMES)}
    b = {name: mask.clone() for name, mask in a.items()}
    # Two groups of one matrix, three of another, turned over: every group keeps two, and differs from what it was.
    b[NAMES[1]].view(-1, 4)[[0, 5]] = ~b[NAMES[1]].view(-1, 4)[[0, 5]]
    b[NAMES[2]].view(-1, 4)[:3] = ~b[NAMES[2]].view(-1, 4)[:3]
    found = diff_masks(write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b))
    assert [(m.layer, m.kind, m.differing, m.groups) for m in found.matrices] == [
        (0, "mlp.up_proj", 0, 16),
        (1, "mlp.down_proj", 3, 16),
        (1, "mlp.up_proj", 2, 16),
    ]
    assert found.share == 5 / 48
    assert found.to_json()["layers"] == {"0": 0.0, "1": 5 / 32}


def test_the_command_prints_a_table_and_json(tmp_path):
    a = {name: random_mask((4, 16), seed) for seed, name in enumerate(NAMES)}
    b = {**a, NAMES[0]: ~a[NAMES[0]]}
    first, second = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    runner = CliRunner()
    shown = runner.invoke(app, ["masks", "diff", str(first), str(second)])
    assert shown.exit_code == 0
    assert "100.00 %" in shown.stdout
    assert "up_proj" in shown.stdout
    parsed = json.loads(runner.invoke(app, ["masks", "diff", str(first), str(second), "--json"]).stdout)
    assert parsed["layers"]["0"] == 1.0
    assert parsed["share"] == pytest.approx(1 / 3)


def test_a_run_directory_stands_for_its_mask(tmp_path):
    a = {name: random_mask((4, 16), seed) for seed, name in enumerate(NAMES)}
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "mask.safetensors", a)
    assert diff_masks(tmp_path / "run", write(tmp_path / "a.safetensors", a)).share == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="finished run"):
        diff_masks(tmp_path / "empty", tmp_path / "a.safetensors")


def test_what_cannot_be_compared_says_why(tmp_path):
    a = write(tmp_path / "a.safetensors", {NAMES[0]: random_mask((4, 16), 0)})
    one_of_four = Pattern(1, 4).best_of(torch.rand(4, 16))
    other = write(tmp_path / "b.safetensors", {NAMES[0]: one_of_four}, Pattern(1, 4))
    with pytest.raises(UsageError, match=r"2:4 .* 1:4"):
        diff_masks(a, other)
    with pytest.raises(MaskError, match="names"):
        diff_masks(a, write(tmp_path / "c.safetensors", {NAMES[1]: random_mask((4, 16), 0)}))
    save_npz(tmp_path / "d.npz", {NAMES[0]: random_mask((4, 16), 0)})
    with pytest.raises(UsageError, match="stores no shapes"):
        diff_masks(a, tmp_path / "d.npz")


def test_masks_of_a_model_come_from_either_format_and_must_fit(tmp_path):
    parameters = by_parameter(find_weights(llama()))
    masks = {p.name: random_mask(tuple(p.refs[0].parameter.shape), i) for i, p in enumerate(parameters)}
    write(tmp_path / "mask.safetensors", masks)
    save_npz(tmp_path / "mask.npz", masks)
    for file in ("mask.safetensors", "mask.npz"):
        found = masks_of_model(tmp_path / file, parameters, P24)
        assert list(found) == [p.name for p in parameters]
        assert all(torch.equal(found[name], masks[name]) for name in masks)
    with pytest.raises(UsageError, match="pattern is 1:4"):
        masks_of_model(tmp_path / "mask.safetensors", parameters, Pattern(1, 4))
    first = parameters[0].name
    write(tmp_path / "part.safetensors", {k: v for k, v in masks.items() if k != first})
    with pytest.raises(UsageError, match=f"no mask for 1 of {len(parameters)} weights, first {first}"):
        masks_of_model(tmp_path / "part.safetensors", parameters, P24)
    write(tmp_path / "shape.safetensors", {**masks, first: random_mask((4, 16), 0)})
    with pytest.raises(UsageError, match="another model"):
        masks_of_model(tmp_path / "shape.safetensors", parameters, P24)
