"""packed-moe exports: what is in the files is what was quantised, decoded bit by bit by a reader of its own, and all else the source."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_fixtures import tensors_of
from quantized_fixtures import Case, make_case
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import UsageError, VerificationError
from compress.export.packed_moe import export_packed_moe
from compress.export.source import open_source
from compress.packed_moe import PackedMoeCheckpoint
from compress.quantize.grid import Grid
from compress.quantize.store import QuantizedStore

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("mixtral"), "mixtral")


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, grid: dict[str, Any], columns: int) -> Tensor:
    """Dense `[N, K]` in float32, as the format's description says it."""
    bits, size, kind = grid["bits"], grid["group_size"], grid["kind"]

    def numbers(packed: Tensor, count: int) -> np.ndarray[Any, Any]:
        stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
        assert not stream[:, count * bits :].any()
        return stream[:, : count * bits].reshape(len(packed), count, bits) @ (1 << np.arange(bits))

    c = numbers(codes, columns)
    groups = -(-columns // size)
    if kind == "asymmetric":
        assert zero is not None
        z = numbers(zero, groups)
    elif kind == "float":
        assert zero is not None
        z = zero.float().numpy()
    else:
        assert zero is None
        z = np.full((len(codes), groups), 2 ** (bits - 1) if kind == "symmetric" else (2**bits - 1) / 2)
    assert scale.dtype == TYPES[grid["scales"]]
    assert scale.shape == (len(codes), groups)
    of = np.arange(columns) // size
    return torch.from_numpy((c.astype(np.float32) - z.astype(np.float32)[:, of]) * scale.float().numpy()[:, of])


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "gpt_oss", "llama", "gpt2"])
def test_files_hold_what_was_quantised(architecture: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    result = case.pack(tmp_path / "out")
    assert all(report.ok for report in result.reports)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((case.source / "config.json").read_text())
    assert (quantization["quant_method"], quantization["version"]) == ("compress-packed-moe", 1)
    tensors, grids = tensors_of(tmp_path / "out"), quantization["grids"]
    nbytes, seen = 0, set()
    for name, entry in quantization["parameters"].items():
        dim, shape = entry["contracted_dim"], entry["shape"]
        assert list(case.dense.model.get_parameter(name).shape) == shape
        columns = shape[dim]
        module = name.rpartition(".")[0]
        for role, numbers in entry["grids"].items():
            count = shape[0] if len(shape) == 3 else 1
            numbers = [numbers] * count if isinstance(numbers, int) else numbers
            for expert, number in enumerate(numbers):
                prefix = f"{module}.{role}_g{number}_" if len(shape) == 3 else f"{name}_"
                place = numbers[:expert].count(number)
                parts = [tensors.get(prefix + part) for part in ("codes", "scale", "zero")]
                one = [part if part is None or len(shape) == 2 else part[place] for part in parts]
                matrix = f"{module}.{expert}.{role}" if len(shape) == 3 else name
                found = decode(*one, grids[number], columns)  # type: ignore[arg-type]
                assert torch.equal(found, case.store.read(matrix).dequantize())
                nbytes += sum(part.nbytes for part in one if part is not None)
                seen |= {prefix + part for part in ("codes", "scale", "zero")}
    assert result.sizes.nbytes == nbytes
    assert result.sizes.whole_nbytes == sum(tensor.nbytes for tensor in tensors.values())
    rest = {name: tensor for name, tensor in tensors.items() if name not in seen}
    original = tensors_of(case.source)
    assert rest
    assert all(torch.equal(tensor, original[name]) for name, tensor in rest.items())
    assert {name for name in original if "norm" in name or "ln_" in name or "embed" in name} <= rest.keys()


def test_replaced_parameters_are_written_in_place_of_the_source(tmp_path: Path) -> None:
    case = make_case(tmp_path, "mixtral")
    name = "model.layers.1.mlp.gate.weight"
    router = torch.randn(case.original.model.get_parameter(name).shape)
    case.store.write_replaced({name: router})
    case.pack(tmp_path / "out")
    found, original = tensors_of(tmp_path / "out"), tensors_of(case.source)
    assert torch.equal(found["model.layers.1.block_sparse_moe.gate.weight"], router)
    assert torch.equal(
        found["model.layers.0.block_sparse_moe.gate.weight"], original["model.layers.0.block_sparse_moe.gate.weight"]
    )
    case.store.write_replaced({"model.other": router})
    with pytest.raises(UsageError, match=r"replaces model.other .*does not have"):
        case.pack(tmp_path / "foreign")


def test_shards_stay_shards(mixtral: Case, tmp_path: Path) -> None:
    mixtral.original.model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    mixtral.pack(tmp_path / "one")
    export_packed_moe(open_source(str(tmp_path / "sharded")), mixtral.store, tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert len(set(index["weight_map"].values())) > 1
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_one_matrix_is_unpacked_at_a_time(mixtral: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = QuantizedStore.read

    def watched(self: QuantizedStore, name: str) -> Any:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive) + 1)
        matrix = read(self, name)
        alive.append(weakref.ref(matrix.codes))
        return matrix

    monkeypatch.setattr(QuantizedStore, "read", watched)
    mixtral.pack(tmp_path / "out")
    assert len(alive) == 2 * len(mixtral.store.grids())  # once to pack, once to verify
    assert most <= 2  # the one being read, and the one before it


def test_stores_that_do_not_fit_are_refused(mixtral: Case, tmp_path: Path) -> None:
    source = open_source(str(mixtral.source))
    with pytest.raises(UsageError, match="holds no quantised matrices"):
        export_packed_moe(source, QuantizedStore(tmp_path / "none"), tmp_path / "out")
    other = make_case(tmp_path / "wide", "mixtral", hidden_size=40)
    with pytest.raises(UsageError, match=r"is \[\d+, 32\] in .*, but \[\d+, 40\]"):
        export_packed_moe(source, other.store, tmp_path / "out")
    part = QuantizedStore(tmp_path / "part")
    name = "model.layers.0.mlp.experts.2.up_proj"
    part.write(0, {name: mixtral.store.read(name)})
    with pytest.raises(UsageError, match="only 1 of its matrices"):
        export_packed_moe(source, part, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_that_no_runtime_can_replace_are_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama4")
    with pytest.raises(UsageError, match="lies in a Llama4TextExperts"):
        case.pack(tmp_path / "out")


@pytest.mark.parametrize("part", ["_codes", "_scale", "norm.weight"])
def test_a_wrong_byte_on_disk_fails_the_verification(
    mixtral: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    real = PackedMoeCheckpoint.__init__

    def damaged(self: PackedMoeCheckpoint, folder: Path) -> None:
        real(self, folder)
        file = folder / "model.safetensors"
        info = next(info for name, info in self.checkpoint.tensors.items() if name.endswith(part))
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        content = bytearray(file.read_bytes())
        begin = json.loads(content[8:header])[info.name]["data_offsets"][0]
        content[header + begin] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(PackedMoeCheckpoint, "__init__", damaged)
    with pytest.raises(VerificationError):
        mixtral.pack(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_the_sizes_and_where_it_loads(mixtral: Case, tmp_path: Path) -> None:
    metrics = [{"method": "quantized", "perplexities": {"wikitext2": 6.25}}]
    result = mixtral.pack(tmp_path / "out", recipe_text="seed: 7\n", metrics=metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    grids = mixtral.store.grids().values()
    weights = sum(rows * columns for _, rows, columns in grids)
    code_bits = sum(grid.bits * rows * columns for grid, rows, columns in grids)
    total = sum(p.numel() for p in mixtral.original.model.parameters())
    size = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert result.sizes.code_bits == code_bits
    assert f"| codes alone | {weights:,} | {code_bits / 8:,.0f} | {code_bits / weights:.3f} |" in card
    assert f"| everything | {total:,} | {size:,} | {8 * size / total:.3f} |" in card
    assert "| quantized | 6.25 |" in card
    assert "```yaml\nseed: 7\n```" in card
    assert "patent" not in card
    assert "n-m-sparsity" not in card
    sidecar = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert sidecar["format"] == "packed-moe"


def test_nothing_foreign_is_overwritten(mixtral: Case, tmp_path: Path) -> None:
    mixtral.pack(tmp_path / "out")
    with pytest.raises(UsageError, match="exists and is not empty"):
        mixtral.pack(tmp_path / "out")
    mixtral.pack(tmp_path / "out", overwrite=True)
    with pytest.raises(UsageError, match="is the source model"):
        mixtral.pack(mixtral.source, overwrite=True)
    with pytest.raises(UsageError, match="quantised checkpoint"):
        open_source(str(tmp_path / "out"))


def test_three_bits_of_whole_groups_take_three_bits(tmp_path: Path) -> None:
    case = make_case(tmp_path, "olmoe", lambda number, ref: Grid(3, 16, "symmetric"))
    result = case.pack(tmp_path / "out")
    assert 8 * result.sizes.nbytes == result.sizes.weights * (3 + 1)  # one 16-bit scale a group of 16
    infos = Checkpoint(tmp_path / "out").tensors
    assert infos["model.layers.0.mlp.experts.gate_proj_g0_codes"].shape == (4, 48, 12)
