"""Inspection: names, sizes, zeros and patterns, against counting loops, in every container."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import UsageError
from compress.inspect import PATTERNS, TensorRow, describe, inspect_checkpoint
from maskllm.patterns import Pattern
from maskllm.storage import save_masks, save_npz

P24 = Pattern(2, 4)


def rows_of(path: Path) -> dict[str, TensorRow]:
    return {row.name: row for row in inspect_checkpoint(path)}


def sparse(pattern: Pattern, shape: tuple[int, int], dim: int, seed: int = 0) -> Tensor:
    """Exactly N non-zeros in every group of M along `dim`, negative ones among them."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(shape, generator=generator).movedim(dim, -1)
    kept = pattern.best_of(moved).movedim(-1, dim)
    return torch.where(kept, torch.rand(shape, generator=generator) - 1.5, 0.0)


def satisfies(tensor: Tensor, pattern: Pattern, dim: int) -> bool:
    for line in tensor.movedim(dim, -1).reshape(-1, tensor.shape[dim]).tolist():
        if len(line) % pattern.m:
            return False
        for start in range(0, len(line), pattern.m):
            if sum(value != 0 for value in line[start : start + pattern.m]) > pattern.n:
                return False
    return True


@given(
    st.sampled_from([*PATTERNS, Pattern(7, 8), Pattern(1, 2)]), st.sampled_from([-1, -2]), st.integers(0, 10**6), st.booleans()
)
def test_the_tightest_pattern_against_a_loop(pattern: Pattern, dim: int, seed: int, spoilt: bool) -> None:
    tensor = sparse(pattern, (16, 24), dim, seed)
    if spoilt:  # one more weight in one group
        tensor[tuple((tensor == 0).nonzero()[seed % int((tensor == 0).sum())])] = 1.0
    expected = next(
        (f"{p}" + ("" if d == -1 else " along -2") for p in PATTERNS for d in (-1, -2) if satisfies(tensor, p, d)), "dense"
    )
    sparsity, found = describe(tensor)
    assert found == expected
    assert sparsity == pytest.approx(float((tensor == 0).float().mean()))


def test_minus_zero_counts_as_zero() -> None:
    tensor = sparse(P24, (4, 8), -1)
    tensor[tensor == 0] = -0.0
    assert describe(tensor) == (0.5, "2:4")


def test_tensors_without_a_pattern() -> None:
    assert describe(torch.ones(8)) == (0.0, "")
    assert describe(torch.ones(())) == (0.0, "")
    assert describe(torch.ones(0, 8)) == (0.0, "")
    assert describe(torch.ones(3, 5)) == (0.0, "dense")


def write_model(folder: Path) -> dict[str, Tensor]:
    tensors = {
        "bf16": sparse(P24, (8, 16), -1).bfloat16(),
        "columns": sparse(P24, (8, 6), -2),
        "fp8": sparse(P24, (4, 8), -1).to(torch.float8_e4m3fn),
        "experts": torch.stack([sparse(Pattern(1, 4), (4, 8), -1, seed) for seed in range(3)]),
        "norm": torch.ones(8),
        "dense": torch.ones(4, 8).half(),
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def test_a_folder_and_its_file(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "model")
    rows = rows_of(tmp_path / "model")
    assert rows == rows_of(tmp_path / "model" / "model.safetensors")
    assert rows.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert rows[name].shape == tuple(tensor.shape)
        assert rows[name].nbytes == tensor.numel() * tensor.itemsize
        assert rows[name].bits == 8 * tensor.itemsize
    assert {name: (row.dtype, row.pattern) for name, row in rows.items()} == {
        "bf16": ("BF16", "2:4"),
        "columns": ("F32", "2:4 along -2"),
        "fp8": ("F8_E4M3", "2:4"),
        "experts": ("F32", "1:4"),
        "norm": ("F32", ""),
        "dense": ("F16", "dense"),
    }
    assert rows["experts"].sparsity == 0.75


def test_shards(tmp_path: Path) -> None:
    tensors = {f"w{i}": sparse(P24, (4, 8), -1, i) for i in range(4)}
    names = {name: f"model-0000{1 + i // 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({"w0": torch.ones(1)}, tmp_path / "optimizer.safetensors")  # not in the index
    rows = rows_of(tmp_path)
    assert set(rows) == set(tensors)
    assert {row.pattern for row in rows.values()} == {"2:4"}
    (tmp_path / names["w3"]).unlink()
    with pytest.raises(UsageError, match="incomplete"):
        rows_of(tmp_path)


def test_mask_files(tmp_path: Path) -> None:
    masks = {"a": sparse(P24, (8, 24), -1) != 0, "b": sparse(P24, (8, 24), -2) != 0}
    save_masks(tmp_path / "mask.safetensors", masks, P24, {"a": -1, "b": -2}, {})
    rows = rows_of(tmp_path / "mask.safetensors")
    assert rows == rows_of(tmp_path)  # a run directory
    assert {name: (row.shape, row.dtype, row.nbytes, row.sparsity, row.pattern) for name, row in rows.items()} == {
        "a": ((8, 24), "mask", 16, 0.5, "2:4"),  # 48 groups, three a byte
        "b": ((8, 24), "mask", 16, 0.5, "2:4 along -2"),
    }
    assert rows["a"].bits == pytest.approx(2 / 3)
    save_npz(tmp_path / "mask.npz", masks)
    published = rows_of(tmp_path / "mask.npz")
    assert (published["a"].nbytes, published["a"].bits, published["a"].sparsity, published["a"].pattern) == (24, 1.0, 0.5, "2:4")


def test_a_checkpoint_whose_metadata_has_a_pattern_is_no_mask_file(tmp_path: Path) -> None:
    save_file({"w": sparse(P24, (4, 8), -1)}, tmp_path / "model.safetensors", {"format": "pt", "pattern": "2:4"})
    assert rows_of(tmp_path / "model.safetensors")["w"].pattern == "2:4"


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    values = sparse(P24, (4, 64), -1).numpy()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", values)
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = rows_of(tmp_path / "m.gguf")
    assert {name: (row.shape, row.dtype, row.bits, row.pattern) for name, row in rows.items()} == {
        "blk.0.attn_q.weight": ((4, 64), "F32", 32.0, "2:4"),
        "blk.0.attn_k.weight": ((4, 64), "Q8_0", 8.5, "2:4"),  # 32 weights and a scale of 16 bits
        "blk.0.attn_norm.weight": ((64,), "F32", 32.0, ""),
    }


@pytest.mark.parametrize("name", ["text.safetensors", "text.npz", "text.gguf", "empty"])
def test_what_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"this is a text of some length, not weights")
    else:
        path.mkdir()
    with pytest.raises(UsageError, match=name):
        rows_of(path)


def test_command(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "model")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model"), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    weights = sum(t.numel() for t in tensors.values())
    assert len(facts["tensors"]) == facts["total"]["tensors"] == len(tensors)
    assert facts["total"]["weights"] == weights
    assert facts["total"]["bytes"] == sum(t.numel() * t.itemsize for t in tensors.values())
    assert facts["total"]["sparsity"] == pytest.approx(sum(int((t.float() == 0).sum()) for t in tensors.values()) / weights)
    table = CliRunner().invoke(app, ["inspect", str(tmp_path / "model")]).stdout
    assert all(name in table for name in tensors)
    assert "2:4 along -2" in table
