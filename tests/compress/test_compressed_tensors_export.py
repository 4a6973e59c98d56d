"""compressed-tensors exports: golden bytes, an unpacker of its own, the groups in config.json, and exact promotion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_fixtures import tensors_of
from quantized_fixtures import Case, make_case
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.export.compressed_tensors import CompressedTensorsExport, export_compressed_tensors, widen
from compress.export.source import open_source
from compress.quantize.gptq import rtn
from compress.quantize.grid import Grid, Quantized
from compress.quantize.store import QuantizedStore
from compress.weights import WeightRef


def export(case: Case, out: Path, **options: Any) -> CompressedTensorsExport:
    return export_compressed_tensors(open_source(str(case.source)), case.store, out, **options)


def plain(number: int, ref: WeightRef) -> Grid:
    """Three bits for experts, asymmetric four for the rest."""
    return Grid(3, 8, "symmetric") if ref.expert is not None else Grid(4, 8, "asymmetric")


def mixed(number: int, ref: WeightRef) -> Grid:
    return (Grid(1, 16, "midrise"), Grid(2, 8, "symmetric"), Grid(3, 24, "asymmetric"), Grid(4, 10, "symmetric"))[number % 4]


def dense(tensors: dict[str, Tensor], module: str, bits: int, size: int) -> Tensor:
    """The weight of a module, word by word in Python integers."""

    def rows(words: Tensor, count: int) -> list[list[int]]:
        result = []
        for row in words.tolist():
            stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
            result.append([((stream >> (bits * i)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(count)])
        return result

    n, k = tensors[f"{module}.weight_shape"].tolist()
    q = torch.tensor(rows(tensors[f"{module}.weight_packed"], k))
    zero = torch.zeros(n, k // size, dtype=torch.int64)
    if f"{module}.weight_zero_point" in tensors:
        zero = torch.tensor(rows(tensors[f"{module}.weight_zero_point"].T, n)).T
    scale = tensors[f"{module}.weight_scale"].float()
    return (q - zero.repeat_interleave(size, 1)).float() * scale.repeat_interleave(size, 1)


DISK = {  # architecture -> its experts on disk
    "mixtral": ("block_sparse_moe.experts.{}", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "olmoe": ("mlp.experts.{}", {}),
    "qwen3_moe": ("mlp.experts.{}", {}),
    "deepseek_v2": ("mlp.experts.{}", {}),
}


@pytest.mark.parametrize("architecture", [*DISK, "llama"])
@pytest.mark.parametrize("promote", [False, True])
def test_files_hold_what_was_quantised_under_the_names_of_the_source(architecture: str, promote: bool, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture, mixed if promote else plain)
    result = export(case, tmp_path / "out", promote=promote)
    assert all(report.ok for report in result.reports)
    assert (result.promoted > 0) is promote
    tensors, original = tensors_of(tmp_path / "out"), tensors_of(case.source)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    seen = set()
    for name in case.store.grids():
        module = name.removesuffix(".weight")
        if (found := re.fullmatch(r"(.*\.)mlp\.experts\.(\d+)\.(\w+)", name)) is not None:
            middle, roles = DISK[architecture]
            module = found[1] + middle.format(found[2]) + "." + roles.get(found[3], found[3])
        assert f"{module}.weight" in original
        (group,) = [g for g in quantization["config_groups"].values() if any(re.match(t[3:], module) for t in g["targets"])]
        weights = group["weights"]
        assert torch.equal(dense(tensors, module, weights["num_bits"], weights["group_size"]), case.store.read(name).dequantize())
        assert (f"{module}.weight_zero_point" in tensors) is not weights["symmetric"]
        assert not any(re.match(t.removeprefix("re:"), module) for t in quantization["ignore"])
        seen |= {f"{module}.weight_{part}" for part in ("packed", "scale", "shape", "zero_point")}
        original.pop(f"{module}.weight")
    rest = {name: tensor for name, tensor in tensors.items() if name not in seen}
    assert rest.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in rest.items())
    assert "lm_head" in quantization["ignore"]


def test_the_configuration_is_what_readers_expect(tmp_path: Path) -> None:
    case = make_case(tmp_path, "mixtral", plain)
    export(case, tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = quantization.pop("config_groups")
    assert quantization == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [r"re:(.*\.)?layers\.(0|1)\.block_sparse_moe\.gate$", "lm_head"],
    }
    assert list(groups) == ["w3_g8_symmetric", "w4_g8_asymmetric"]
    assert groups["w3_g8_symmetric"] == {
        "targets": [rf"re:(.*\.)?layers\.(0|1)\.block_sparse_moe\.experts\.\d+\.{w}$" for w in ("w1", "w3", "w2")],
        "format": "pack-quantized",
        "weights": {
            "num_bits": 3,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 8,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
    assert groups["w4_g8_asymmetric"]["targets"][0] == r"re:(.*\.)?layers\.(0|1)\.self_attn\.q_proj$"


def test_what_is_not_quantised_is_ignored(tmp_path: Path) -> None:
    case = make_case(tmp_path, "qwen2_moe", plain)
    store = QuantizedStore(tmp_path / "part")
    names = [n for n in case.store.grids() if n.startswith("model.layers.1.") and "self_attn" not in n]
    store.write(1, {name: case.store.read(name) for name in names})
    export_compressed_tensors(open_source(str(case.source)), store, tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    modules = {
        name.removesuffix(".weight") for name, t in tensors_of(case.source).items() if t.dim() == 2 and "embed" not in name
    }
    patterns = [t.removeprefix("re:") for t in quantization["ignore"]]
    ignored = {module for module in modules if any(re.match(pattern, module) for pattern in patterns)}
    tensors = tensors_of(tmp_path / "out")
    assert ignored == {module for module in modules if f"{module}.weight" in tensors}
    assert {"lm_head", "model.layers.0.mlp.experts.3.up_proj", "model.layers.1.mlp.gate"} <= ignored
    assert "model.layers.1.mlp.shared_expert_gate" in ignored
    assert "model.layers.1.mlp.experts.3.up_proj" not in ignored


def test_golden_bytes(tmp_path: Path) -> None:
    """Three-bit codes 0 1 2 ... 7, twice in a row: the words that compressed-tensors 0.20 writes for them."""
    codes = (torch.arange(16) % 8).to(torch.uint8).repeat(16, 1)
    case = make_case(tmp_path, "llama", plain, hidden_size=16, intermediate_size=16)
    zero = (torch.arange(16) % 8).to(torch.uint8).view(16, 1).repeat(1, 2)
    name = "model.layers.0.self_attn.k_proj.weight"
    store = QuantizedStore(tmp_path / "golden")
    store.write(0, {name: Quantized(codes, torch.full((16, 2), 0.5, dtype=torch.float16), zero, Grid(3, 8, "asymmetric"))})
    export_compressed_tensors(open_source(str(case.source)), store, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    module = name.removesuffix(".weight")
    # 0b111_110_101_100_011_010_001_000 = 0xFAC688, then again, cut into 32 bits.
    assert tensors[f"{module}.weight_packed"][0].tolist() == [0x88FAC688 - (1 << 32), 0xFAC6]
    assert tensors[f"{module}.weight_zero_point"].tolist() == [[0x88FAC688 - (1 << 32)] * 2, [0xFAC6] * 2]
    assert tensors[f"{module}.weight_shape"].tolist() == [16, 16]
    assert (tensors[f"{module}.weight_scale"].dtype, tensors[f"{module}.weight_scale"].shape) == (torch.float16, (16, 2))


def test_mixed_experts_need_promotion(tmp_path: Path) -> None:
    case = make_case(tmp_path, "olmoe", lambda n, ref: Grid(2 + n % 2, 8, "symmetric"))
    with pytest.raises(UsageError, match=r"layers.0.mlp.experts mixes 2 bits .*, 3 bits .*--promote.*packed-moe"):
        export(case, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(1, 8, "midrise"), r"midrise codes of 1 bits.*--promote"),
        (Grid(1, 8, "asymmetric"), r"asymmetric codes of 1 bits.*--promote"),
        (Grid(4, 8, "float"), r"float grid, whose zeros compressed-tensors cannot hold at any width.*packed-moe"),
        (Grid(4, 12, "symmetric"), r"12 does not divide its 32 inputs.*--promote"),
    ],
)
def test_grids_that_the_format_does_not_know(grid: Grid, message: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", lambda n, ref: grid)
    with pytest.raises(UsageError, match=message):
        export(case, tmp_path / "out")
    if grid.kind == "float":
        with pytest.raises(UsageError, match="float grid"):
            export(case, tmp_path / "out", promote=True)
    else:
        assert export(case, tmp_path / "out", promote=True).reports[0].ok


def test_eight_midrise_bits_have_no_container(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", lambda n, ref: Grid(8, 8, "midrise"))
    with pytest.raises(UsageError, match="need 9 in compressed-tensors"):
        export(case, tmp_path / "out", promote=True)


@pytest.mark.parametrize(("architecture", "what"), [("gpt_oss", "in one piece"), ("gpt2", "lies in a Conv1D")])
def test_layers_that_are_none_on_disk(architecture: str, what: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture, plain)
    with pytest.raises(UsageError, match=rf"{what}.*--format packed-moe"):
        export(case, tmp_path / "out")


def test_scales_have_the_type_of_the_model(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", lambda n, ref: Grid(4, 8, "symmetric", torch.bfloat16), dtype=torch.bfloat16)
    export(case, tmp_path / "out")
    assert {t.dtype for name, t in tensors_of(tmp_path / "out").items() if name.endswith("_scale")} == {torch.bfloat16}
    case = make_case(tmp_path / "half", "llama", lambda n, ref: Grid(4, 8, "symmetric", torch.float16), dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"round to the torch.bfloat16 of the model; quantise with scales in torch.bfloat16"):
        export(case, tmp_path / "lost")


@given(
    st.sampled_from(["symmetric", "asymmetric", "midrise"]),
    st.integers(1, 7),
    st.integers(0, 3),
    st.sampled_from([(8, 8), (12, 4), (128, 32), (24, 12)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_promotion_keeps_every_value(kind: Any, bits: int, more: int, sizes: tuple[int, int], zeros: bool, seed: int) -> None:
    bits = max(bits, 2) if kind == "symmetric" else bits
    matrix = rtn(torch.randn(6, 48, generator=torch.Generator().manual_seed(seed)), Grid(bits, sizes[0], kind), search=False)
    wide = min(8, max(2, bits + (kind == "midrise")) + more)
    zeros = zeros or kind == "asymmetric"
    found = widen(matrix, Grid(wide, sizes[1], "asymmetric" if zeros else "symmetric"))
    assert int(found.codes.max()) < 2**wide
    assert torch.equal(found.dequantize().view(torch.int32), matrix.dequantize().view(torch.int32))


def test_promotion_refuses_what_it_cannot_keep() -> None:
    codes = torch.tensor([[0, 1]], dtype=torch.uint8)
    small = Quantized(codes, torch.tensor([[2.0**-24]], dtype=torch.float16), None, Grid(1, 2, "midrise"))
    with pytest.raises(CompressError, match="too small to be halved"):
        widen(small, Grid(2, 2, "symmetric"))
    zero = torch.tensor([[1]], dtype=torch.uint8)
    one = torch.ones(1, 1, dtype=torch.float16)
    with pytest.raises(UsageError, match="no exact symmetric form"):
        widen(Quantized(codes, one, zero, Grid(2, 2, "asymmetric")), Grid(4, 2, "symmetric"))
    with pytest.raises(UsageError, match="no exact form"):
        widen(Quantized(codes, one, one, Grid(2, 2, "float")), Grid(4, 2, "asymmetric"))
    with pytest.raises(UsageError, match="no exact form as symmetric codes of 2 bits"):
        widen(Quantized(codes, one, None, Grid(3, 2, "symmetric")), Grid(2, 2, "symmetric"))


def test_the_card_says_what_readers_make_of_it(tmp_path: Path) -> None:
    layers = make_case(tmp_path / "layers", "olmoe", lambda n, ref: Grid(2 if ref.layer else 3, 8, "symmetric"))
    export(layers, tmp_path / "layers" / "out")
    assert "**no**: it decodes the experts of all layers by one scheme" in (tmp_path / "layers" / "out" / "README.md").read_text()
    same = make_case(tmp_path / "same", "olmoe", lambda n, ref: Grid(3, 8, "symmetric"))
    export(same, tmp_path / "same" / "out")
    card = (tmp_path / "same" / "out" / "README.md").read_text()
    assert "| transformers with the package compressed-tensors | yes" in card
    assert "3.00 bits a weight on average" in card
