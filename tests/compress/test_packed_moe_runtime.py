"""The low-bit modules and the loaders: products, state, transformers' own classes, and one clear error for each wrong folder."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_fixtures import tensors_of
from quantized_fixtures import KINDS, Case, make_case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compress
from compress.bench_model import backend_of
from compress.errors import CompressError, UsageError
from compress.export.lowbit import quantized_parameters
from compress.export.packed_moe import describe
from compress.export.routing import export_routing
from compress.export.source import open_source
from compress.hf import PackedMoeQuantizer
from compress.inspect import inspect_checkpoint
from compress.packed_moe import LowBitMatrix, from_config, to_config
from compress.quantize.gptq import rtn
from compress.quantize.grid import Grid
from compress.routing.calibrate import rule_decisions
from compress.routing.gate import attach, routing_of
from compress.routing.mixtures import observe
from compress.routing.storage import save
from compress.runtime_lowbit import LowBitLinear, lowbit_linear
from compress.verify_packed_moe import verify_packed_moe

MOES = ["mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "gpt_oss"]
Q = "model.layers.0.self_attn.q_proj."
SLAB = "model.layers.1.mlp.experts.up_proj_"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = make_case(tmp_path_factory.mktemp("mixtral"), "mixtral")
    case.pack(case.source.parent / "packed")
    return case


@pytest.fixture
def folder(mixtral: Case, tmp_path: Path) -> Path:
    shutil.copytree(mixtral.source.parent / "packed", tmp_path / "packed")
    return tmp_path / "packed"


@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 99),
)
def test_a_packed_matrix_is_the_quantised_one(
    bits: int, columns: int, size: int, kind: Any, dtype: torch.dtype, seed: int
) -> None:
    grid = Grid(max(bits, 2) if kind == "symmetric" else bits, size, kind, dtype)
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    meant = rtn(weight, grid, search=False)
    found = LowBitMatrix.of(meant)
    assert torch.equal(found.unpacked().codes, meant.codes)
    for to in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(found.dequantize(to), meant.dequantize(to))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_the_layer_is_the_dense_product(x_dtype: torch.dtype, biased: bool) -> None:
    matrix = LowBitMatrix.of(rtn(torch.randn(24, 36, generator=torch.Generator().manual_seed(0)), Grid(3, 16, "float")))
    bias = torch.linspace(-1, 1, 24).to(x_dtype) if biased else None
    layer = LowBitLinear.from_packed(matrix, bias)
    x = torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    expected = nn.functional.linear(x, matrix.dequantize(x_dtype), bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(lowbit_linear(x, matrix, bias), expected)
    state = copy.deepcopy(layer.half()).to(torch.bfloat16).state_dict()
    assert (state["weight_codes"].dtype, state["weight_scale"].dtype) == (torch.uint8, torch.float16)
    again = LowBitLinear(36, 24, matrix.grid, bias=None if bias is None else torch.bfloat16)
    again.load_state_dict(state)
    assert torch.equal(again.matrix.dequantize(), matrix.dequantize())
    assert "bits=3" in repr(layer)


@pytest.mark.parametrize("architecture", [*MOES, "llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_computes_what_the_dequantised_one_does(architecture: str, dtype: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture, dtype=getattr(torch, dtype))
    case.pack(tmp_path / "packed")
    model = compress.load(tmp_path / "packed", device="cpu")
    dense: Any = case.dense.model
    if architecture in MOES:
        dense.set_experts_implementation("eager")
    assert model.dtype == dense.dtype
    tokens = tiny_configs.tokens()
    with torch.no_grad():
        found, expected = model(tokens).logits, dense(tokens).logits
    assert found.dtype == expected.dtype
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=8 * eps, atol=8 * eps * float(expected.abs().max()))
    assert not torch.allclose(found, case.original.model(tokens).logits, atol=1e-2)


def experts_of(folder: Path) -> Any:
    return next(module for module in compress.load(folder, device="cpu").modules() if hasattr(module, "packed_matrix"))


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_only_reached_experts_are_dequantised_and_dropped_slots_add_nothing(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case(tmp_path, architecture).pack(tmp_path / "packed")
    experts = experts_of(tmp_path / "packed")
    used: list[int] = []
    real = type(experts).packed_matrix
    monkeypatch.setattr(
        type(experts), "packed_matrix", lambda self, role, expert: (used.append(expert), real(self, role, expert))[1]
    )
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    none = experts.num_experts
    index = torch.tensor([[2, none], [none + 3, 2], [none, none]])
    weights = torch.tensor([[0.5, torch.nan], [torch.nan, 2.0], [torch.nan, torch.nan]])
    with torch.no_grad():
        found = experts(x, index, weights)
        assert set(used) == {2}
        one = experts._expert(2, x[:2])
        torch.testing.assert_close(found, torch.cat([one * torch.tensor([[0.5], [2.0]]), torch.zeros(1, 32)]))
        assert not experts(x, torch.full_like(index, none), weights).any()
        assert experts(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_a_part_of_the_experts_parameters_can_be_quantised(tmp_path: Path) -> None:
    case = make_case(tmp_path, "gpt_oss")
    kept = [name for name in case.store.grids() if "down_proj" in name]
    matrices = {name: case.store.read(name) for name in kept}
    shutil.rmtree(case.store.folder)
    case.store.write(0, matrices)
    case.pack(tmp_path / "packed")
    model = compress.load(tmp_path / "packed", device="cpu")
    dense: Any = case.original.model
    for layer in range(2):
        experts = dense.get_submodule(f"model.layers.{layer}.mlp.experts")
        for expert in range(4):
            values = matrices[f"model.layers.{layer}.mlp.experts.{expert}.down_proj"].dequantize()
            experts.down_proj.data[expert] = values.T
    dense.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(model(tiny_configs.tokens()).logits, dense(tiny_configs.tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v2"])
def test_from_pretrained_generate_and_save_pretrained(architecture: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    case.pack(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(model.hf_quantizer, PackedMoeQuantizer)
    assert model.hf_quantizer.is_serializable()
    assert not model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_compileable
    tokens = tiny_configs.tokens(batch=1, length=6)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = case.dense.model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, **options), expected)

    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written == json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    sizes = [sum(t.nbytes for t in tensors_of(tmp_path / name).values()) for name in ("packed", "again")]
    assert sizes[0] == sizes[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again.generate(tokens, **options), expected)
    assert verify_packed_moe(tmp_path / "again").ok


def test_scales_keep_their_type_whatever_the_activations_are(folder: Path) -> None:
    stored = tensors_of(folder)
    for dtype in ("float32", "bfloat16", "float16"):
        model = compress.load(folder, dtype=dtype, device="cpu")
        kind = getattr(torch, dtype)
        assert {p.dtype for p in model.parameters()} == {kind}
        scales = {name: buffer for name, buffer in model.named_buffers() if name.endswith(("_scale", "_zero"))}
        assert {torch.float16, torch.bfloat16} <= {buffer.dtype for buffer in scales.values()}
        assert all(torch.equal(buffer, stored[name]) for name, buffer in scales.items() if name in stored)
        assert sum(name in stored for name in scales) > 10
        assert model(tiny_configs.tokens()).logits.dtype == kind


def test_without_the_import_transformers_warns_and_does_not_load_the_weights(folder: Path) -> None:
    """What the model card says of transformers alone."""
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model, info = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True)\n"
        "print(len(info['missing_keys']))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Unknown quantization type, got compress-packed-moe" in result.stderr
    assert int(result.stdout.split()[-1]) == 2 * (4 + 2)


def test_the_description_goes_out_and_comes_back(mixtral: Case) -> None:
    parameters = describe(quantized_parameters(open_source(str(mixtral.source)), mixtral.store), mixtral.store)
    again = from_config(json.loads(json.dumps(to_config(parameters))), "here")
    assert again == parameters
    matrices = {name: (slab.grid, slab.rows, slab.columns) for p in again for name, slab, _ in p.matrices()}
    assert matrices == mixtral.store.grids()


def test_inspect_shows_bits_and_bytes(mixtral: Case, folder: Path) -> None:
    rows = {row.name: row for row in inspect_checkpoint(folder)}
    row = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert row.shape == (4, 96, 32)
    assert row.dtype == "packed 1, 2, 3, 4, 5, 6, 7, 8 bit"
    assert row.bits == pytest.approx(8 * row.nbytes / (4 * 96 * 32))
    assert sum(row.nbytes for row in rows.values()) == sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert rows["model.norm.weight"].dtype == "F32"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def slab_of(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in tensors if name.startswith(SLAB) and name.endswith(part))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "version": (lambda f: edit_config(f, lambda c: c.update(version=7)), "version 7; this release reads version 1"),
    "truncated": (cut, "truncated"),
    "a packed tensor is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(slab_of(t, "_codes"))),
        rf"{SLAB}g\d+_codes, a part of the packed model.layers.1.mlp.experts.gate_up_proj, is missing",
    ),
    "another tensor is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        r"are missing \(model\.norm\.weight\)",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({Q + "weight_codes": t[Q + "weight_codes"][:-1].contiguous()})),
        rf"{Q}weight_codes is U8 .*contradicts itself",
    ),
    "dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({Q + "weight_scale": t[Q + "weight_scale"].float()})),
        rf"{Q}weight_scale is F32 .*contradicts itself",
    ),
    "a scale that is no number": (
        lambda f: edit_tensors(f, lambda t: t[slab_of(t, "_scale")][0, 3].fill_(torch.inf)),
        r"_scale holds values that are not finite; the file is damaged",
    ),
    "bits": (lambda f: edit_config(f, lambda c: c["grids"][0].update(bits=9)), "a grid has 1 to 8 bits, not 9"),
    "no grids": (lambda f: edit_config(f, lambda c: c.pop("grids")), r"cannot be read \(KeyError\('grids'\)\)"),
    "no parameters": (lambda f: edit_config(f, lambda c: c["parameters"].clear()), "lists no parameters"),
    "a grid that is none": (
        lambda f: edit_config(f, lambda c: c["parameters"][Q + "weight"].update(grids={"weight": 99})),
        "numbers do not fit",
    ),
    "roles": (
        lambda f: edit_config(f, lambda c: c["parameters"]["model.layers.1.mlp.experts.gate_up_proj"]["grids"].pop("up_proj")),
        "has the matrices gate_proj, up_proj, not gate_proj",
    ),
    "another parameter": (
        lambda f: edit_config(f, lambda c: c["parameters"].update({"model.x.weight": c["parameters"].pop(Q + "weight")})),
        "model.x.weight",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_of_a_folder_has_its_own_message(folder: Path, fault: str) -> None:
    damage, message = BROKEN[fault]
    damage(folder)
    with pytest.raises(CompressError, match=message):
        compress.load(folder)


def test_verify_names_the_matrix_that_is_damaged(folder: Path) -> None:
    assert verify_packed_moe(folder).ok
    edit_tensors(folder, lambda t: t[slab_of(t, "_scale")][0, 3].fill_(torch.nan))
    report = verify_packed_moe(folder)
    bad = [row.name for row in report.rows if not row.ok]
    assert len(bad) == 1
    assert bad[0].endswith("up_proj")
    assert verify_packed_moe(folder, exclude=["*.up_proj"]).ok
    with pytest.raises(UsageError, match="no matrix to check"):
        verify_packed_moe(folder, include=["nothing"])


def test_a_routing_beside_a_packed_folder_is_attached(tmp_path: Path) -> None:
    make_case(tmp_path, "olmoe", num_experts_per_tok=3).pack(tmp_path / "packed")
    tokens = tiny_configs.tokens(batch=2, length=10)
    model: Any = compress.load(tmp_path / "packed", device="cpu")
    plain = model(tokens).logits
    mixtures, seen = observe(model, [tokens])
    routing = attach(model, mixtures, rule_decisions("top-k", mixtures, seen, 2), "top-k")
    save(tmp_path / "run", routing, {"model": str(tmp_path / "packed")})
    export_routing(tmp_path / "run", tmp_path / "routed")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "routed")
    assert routing_of(loaded) is not None
    found = loaded(tokens).logits
    assert torch.equal(found, model(tokens).logits)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_benchmarks_name_the_widths(folder: Path) -> None:
    assert backend_of(compress.load(folder, device="cpu")) == "low-bit 1, 2, 3, 4, 5, 6, 7, 8"
