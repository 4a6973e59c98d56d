"""Mask files: golden bytes, round trips for every pattern, shape and dimension, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from maskllm import storage
from maskllm.errors import MaskError
from maskllm.patterns import Pattern

P24 = Pattern(2, 4)
PATTERNS = [Pattern(n, m) for m in range(2, 9) for n in range(1, m)]


def random_mask(pattern: Pattern, shape: tuple[int, ...], dim: int, seed: int = 0) -> torch.Tensor:
    moved = list(shape)
    moved.append(moved.pop(dim))
    moved[-1] //= pattern.m
    index = torch.randint(pattern.count, moved, generator=torch.Generator().manual_seed(seed))
    return pattern.mask_of(index).movedim(-1, dim).contiguous()


def test_golden_bytes_of_24() -> None:
    # Groups 1010 0011 0110 | 1100 0101: digits 1 5 3 | 0 4, so 1 + 5*6 + 3*36 = 139, and 0 + 4*6 (+ filling 0) = 24.
    mask = torch.tensor([int(c) for c in "10100011011011000101"]).bool()
    packed = storage.pack_mask(mask, P24)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [139, 24]
    assert torch.equal(storage.unpack_mask(packed, P24, mask.shape), mask)


@pytest.mark.parametrize(("text", "d"), [("1:2", 8), ("1:3", 5), ("1:4", 4), ("2:4", 3), ("3:4", 4), ("4:8", 1)])
def test_digits_per_byte(text: str, d: int) -> None:
    assert storage.digits_per_byte(Pattern.parse(text)) == d


@settings(deadline=None)
@given(st.sampled_from([*PATTERNS]), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_pack_round_trip_and_random_access(pattern: Pattern, rows: int, groups: int, seed: int) -> None:
    mask = random_mask(pattern, (rows, groups * pattern.m), -1, seed)
    packed = storage.pack_mask(mask, pattern)
    assert packed.numel() == storage.packed_size(pattern, mask.numel())
    assert torch.equal(storage.unpack_mask(packed, pattern, mask.shape), mask)
    index, c, d = pattern.index_of(mask).flatten().tolist(), pattern.count, storage.digits_per_byte(pattern)
    raw = packed.tolist()
    assert index == [raw[g // d] // c ** (g % d) % c for g in range(len(index))]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([P24, Pattern(1, 3), Pattern(4, 8), Pattern(1, 2)]), st.integers(1, 9))
def test_chunking_changes_nothing(pattern: Pattern, groups_a_chunk: int) -> None:
    mask = random_mask(pattern, (5, 7 * pattern.m), -1)
    whole = storage.pack_mask(mask, pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_CHUNK", groups_a_chunk * pattern.m)
        assert torch.equal(storage.pack_mask(mask, pattern), whole)
        assert torch.equal(storage.unpack_mask(whole, pattern, mask.shape), mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 2), -1), ((2, 3), -2), ((2, 3, 2), -1), ((2, 2, 3), -2)])
def test_file_round_trip(tmp_path: Path, pattern: Pattern, shape: tuple[int, ...], dim: int) -> None:
    full = list(shape)
    full[dim] *= pattern.m
    masks = {"b.weight": random_mask(pattern, tuple(full), dim), "a.weight": random_mask(pattern, tuple(full), dim, 1)}
    file = tmp_path / "mask.safetensors"
    storage.save_masks(file, masks, pattern, dict.fromkeys(masks, dim), {"model": "m"})
    loaded = storage.load_masks(file)
    assert loaded.pattern == pattern
    assert loaded.contracted == dict.fromkeys(masks, dim)
    assert loaded.metadata == {"model": "m"}
    assert loaded.masks.keys() == masks.keys()
    assert all(torch.equal(loaded.masks[name], masks[name]) for name in masks)
    assert storage.mask_digest(loaded.masks) == storage.mask_digest(masks)
    assert [item.name for item in tmp_path.iterdir()] == ["mask.safetensors"]  # no temporary left


def test_same_content_same_bytes(tmp_path: Path) -> None:
    masks = {name: random_mask(P24, (2, 8), -1, i) for i, name in enumerate("abcde")}
    metadata = {str(i): str(i) for i in range(20)}
    storage.save_masks(tmp_path / "1", masks, P24, dict.fromkeys(masks, -1), metadata)
    storage.save_masks(
        tmp_path / "2", dict(reversed(masks.items())), P24, dict.fromkeys(masks, -1), dict(reversed(metadata.items()))
    )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "mask.safetensors"
    storage.save_masks(file, {"w": random_mask(P24, (2, 8), -1)}, P24, {"w": -1}, {})
    before = file.read_bytes()
    with pytest.raises(MaskError, match="w: "):
        storage.save_masks(file, {"w": torch.ones(2, 8).bool()}, P24, {"w": -1}, {})
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def good_file(tmp_path: Path) -> Path:
    file = tmp_path / "mask.safetensors"
    storage.save_masks(file, {"w": random_mask(P24, (4, 20), -1)}, P24, {"w": -1}, {})
    return file


def rewrite(file: Path, packed: torch.Tensor | None = None, **changes: str | None) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        metadata = dict(handle.metadata())
    tensors = load_file(file) if packed is None else {"w": packed}
    save_file(tensors, file, {k: v for k, v in (metadata | changes).items() if v is not None})


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"format": None},
        {"version": "2"},
        {"pattern": "9:4"},
        {"pattern": None},
        {"shapes": "{}"},
        {"shapes": None},
        {"shapes": "not json"},
        {"shapes": json.dumps({"w": [4, 24]})},
        {"contracted": json.dumps({"w": -3})},
        {"candidates": "0011,0101,0110,1001,1010,1100"},
    ],
    ids=str,
)
def test_headers_that_do_not_fit(tmp_path: Path, changes: dict[str, str | None]) -> None:
    file = good_file(tmp_path)
    rewrite(file, **changes)
    with pytest.raises(MaskError):
        storage.load_masks(file)


def test_damaged_digits(tmp_path: Path) -> None:
    file = good_file(tmp_path)
    packed = load_file(file)["w"]
    packed[2] = 216
    rewrite(file, packed)
    with pytest.raises(MaskError, match="216"):
        storage.load_masks(file).masks["w"]
    packed[2] = 0
    packed[-1] = 215  # 20 groups: the last byte holds two, its third digit is filling
    rewrite(file, packed)
    with pytest.raises(MaskError, match="filling"):
        storage.load_masks(file).masks["w"]


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_truncated_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = good_file(tmp_path_factory.mktemp("cut"))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(MaskError):
        storage.load_masks(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="no such"):
        storage.load_masks(tmp_path / "none.safetensors")


def test_golden_npz(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]]).bool()
    storage.save_npz(tmp_path / "mask_compressed.npz", {"l.weight": mask})
    with np.load(tmp_path / "mask_compressed.npz", allow_pickle=False) as file:
        assert file.files == ["l.weight.mask"]
        assert file["l.weight.mask"].dtype == np.uint8
        assert file["l.weight.mask"].tolist() == [0b11000101, 0b00110000]
    loaded = storage.load_npz(tmp_path / "mask_compressed.npz", {"l.weight": (3, 4)}, {"l.weight": -1})
    assert torch.equal(loaded["l.weight"], mask)


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_npz_that_do_not_fit(tmp_path: Path) -> None:
    shapes, dims = {"w": (2, 4)}, {"w": -1}
    bits = np.array([0b11001100], dtype=np.uint8)
    cases = {
        "exactly": {"w.mask": np.array([0b11101100], dtype=np.uint8)},
        "holds a mask for": {"v.mask": bits},
        "does not end": {"w": bits},
        "takes 1": {"w.mask": np.zeros(2, dtype=np.uint8)},
        "plain arrays": {"w.mask": np.array([{}], dtype=object)},
    }
    for message, arrays in cases.items():
        with pytest.raises(MaskError, match=message):
            storage.load_npz(write_npz(tmp_path / "m.npz", **arrays), shapes, dims)
    (tmp_path / "m.npz").write_bytes(b"no zip")
    with pytest.raises(MaskError):
        storage.load_npz(tmp_path / "m.npz", shapes, dims)
    with pytest.raises(MaskError, match="beyond"):
        storage.load_npz(
            write_npz(tmp_path / "m.npz", **{"w.mask": np.array([0b11001000 | 1], dtype=np.uint8)}), {"w": (1, 4)}, dims
        )


def test_digest_and_difference() -> None:
    a = {"x": random_mask(P24, (4, 8), -1), "y": random_mask(P24, (8, 4), -2)}
    b = {name: mask.clone() for name, mask in a.items()}
    assert storage.mask_digest(a) == storage.mask_digest(dict(reversed(b.items())))
    b["y"][:4, 1] = ~b["y"][:4, 1]
    assert storage.mask_digest(a) != storage.mask_digest(b)
    assert storage.mask_digest({"x": a["x"]}) != storage.mask_digest({"x": a["x"].reshape(8, 4)})
    assert storage.difference(a, b, P24, {"x": -1, "y": -2}) == {"x": (0, 8), "y": (1, 8)}
    with pytest.raises(MaskError):
        storage.difference(a, {"x": a["x"]}, P24, {"x": -1})


def test_group_counts_against_a_loop() -> None:
    mask = torch.rand(3, 8, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    counts = storage.group_counts(mask, 4, -2)
    for e in range(3):
        for column in range(5):
            for group in range(2):
                assert counts[e, column, group] == mask[e, 4 * group : 4 * group + 4, column].sum()
