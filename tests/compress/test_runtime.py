"""The packed modules and the loader: products, state, and one clear error for each way in which a folder can be wrong."""

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
from packed_fixtures import P24, Case, make_case, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compress
from compress.errors import CompressError, UsageError
from compress.packed import PackedMatrix
from compress.runtime import Sparse24Linear, _PackedExperts, install
from compress_kernels.sparse24 import pack, unpack

UP = "model.layers.1.mlp.up_proj."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama", attention_bias=True)


@pytest.fixture
def folder(llama: Case, tmp_path: Path) -> Path:
    llama.pack(tmp_path / "packed", values="bf16")
    return tmp_path / "packed"


def sparse(rows: int, columns: int, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight * P24.best_of(weight.abs())


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_the_layer_is_the_dense_product(values: torch.dtype, x_dtype: torch.dtype, biased: bool) -> None:
    packed = pack(sparse(24, 36), values)
    bias = torch.linspace(-1, 1, 24).to(x_dtype) if biased else None
    layer = Sparse24Linear.from_packed(packed, bias)
    x = torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    found = layer(x)
    exact = nn.functional.linear(x.double(), unpack(packed, torch.float64), None if bias is None else bias.double())
    assert (found.dtype, found.shape) == (x_dtype, (2, 3, 24))
    torch.testing.assert_close(
        found.double(), exact, rtol=2 * torch.finfo(x_dtype).eps, atol=1e-5 if x_dtype == torch.float32 else 2e-2
    )


def test_int8_activations_are_asked_of_the_kernel() -> None:
    packed, x = pack(sparse(16, 64), torch.int8), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    plain, rounded = (Sparse24Linear.from_packed(packed, activation=kind)(x) for kind in ("float", "int8"))
    step = x.abs().amax(-1, keepdim=True) / 127
    q = (x / step).round() * step
    torch.testing.assert_close(rounded, nn.functional.linear(q, unpack(packed)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, rounded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
def test_state_goes_out_and_comes_back(values: torch.dtype) -> None:
    layer = Sparse24Linear.from_packed(pack(sparse(8, 20), values), torch.ones(8))
    state = layer.state_dict()
    assert set(state) == {"values", "meta", "bias"} | ({"scale"} if values == torch.int8 else set())
    empty = Sparse24Linear(20, 8, values=values, bias=torch.float32)
    empty.load_state_dict(state)
    x = torch.randn(3, 20)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    text = repr(layer)
    assert "in_features=20, out_features=8, bias=True" in text
    assert str(values).removeprefix("torch.") in text


def test_a_change_of_type_is_one_of_activations_only() -> None:
    layer = Sparse24Linear.from_packed(pack(sparse(8, 16), torch.int8), torch.ones(8))
    before = {name: part.clone() for name, part in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    for name, part in layer.state_dict().items():
        assert part.dtype == (torch.bfloat16 if name == "bias" else before[name].dtype)
        assert torch.equal(part.float(), before[name].float())
    assert layer(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to("meta").values.is_meta


def test_inputs_that_4_does_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 4 inputs, not 18"):
        Sparse24Linear(18, 8, values=torch.bfloat16)


def test_the_layer_compiles_into_one_graph() -> None:
    layer = Sparse24Linear.from_packed(pack(sparse(8, 16), torch.bfloat16), torch.ones(8))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gemma3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2"]
)
def test_a_loaded_model_computes_what_the_masked_one_does(architecture: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    case.pack(tmp_path / "packed")
    packed = compress.load(tmp_path / "packed", device="cpu")
    assert not packed.training
    assert not any(name in dict(packed.named_parameters()) for name in case.masks.masks)
    dense = case.loaded.model
    for name in case.masks.masks:
        dense.get_parameter(name).data = case.meant(name)
    tokens = tiny_configs.tokens()
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_part_of_the_experts_can_be_packed(tmp_path: Path) -> None:
    case = make_case(tmp_path, "gpt_oss")
    down = "model.layers.0.mlp.experts.down_proj"
    model = tiny_configs.gpt_oss()
    matrix = PackedMatrix(down, tuple(model.get_parameter(down).shape), -2, "fp32")
    meant = case.meant(down)
    state = dict(model.state_dict())
    install(model, [matrix])
    packed = [pack(expert.T.contiguous()) for expert in meant]
    del state[down]
    state[f"{down}_values"] = torch.stack([one.values for one in packed])
    state[f"{down}_meta"] = torch.stack([one.meta for one in packed])
    model.load_state_dict(state)
    dense = tiny_configs.gpt_oss()
    dense.get_parameter(down).data = meant
    tokens = tiny_configs.tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def packed_experts(architecture: str, folder: Path) -> Any:
    """The first module of experts of a tiny model, packed."""
    make_case(folder, architecture).pack(folder / "packed")
    model = compress.load(folder / "packed", device="cpu")
    return next(module for module in model.modules() if isinstance(module, _PackedExperts))


def routed(experts: Any, tokens: int = 9, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, `k` distinct experts for each, and weights."""
    generator = torch.Generator().manual_seed(2)
    hidden = experts.gate_up_proj_values.shape[-1] * 2
    index = torch.rand(tokens, experts.num_experts, generator=generator).argsort(1)[:, :k]
    return torch.randn(tokens, hidden, generator=generator), index, torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "gpt_oss"])
def test_dropped_slots_cost_nothing_and_add_nothing(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = packed_experts(architecture, tmp_path)
    x, index, weights = routed(experts)
    rows: list[int] = []
    real = _PackedExperts._expert
    monkeypatch.setattr(_PackedExperts, "_expert", lambda self, i, x: (rows.append(len(x)), real(self, i, x))[1])
    dropped = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    dropped[2], dropped[4] = True, False  # a token without experts, and one with all
    with torch.no_grad():
        expected = experts(x, index, weights.masked_fill(dropped, 0.0))
        rows.clear()
        found = experts(x, index.masked_fill(dropped, experts.num_experts), weights)
        assert sum(rows) == int((~dropped).sum())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not found[2].any()
        assert torch.equal(found[4], expected[4])
        # Not even a weight that is no number reaches the result of a slot that is dropped.
        assert torch.equal(
            experts(x, index.masked_fill(dropped, experts.num_experts + 5), weights.masked_fill(dropped, torch.nan)), found
        )


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_and_no_experts_left(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    experts = packed_experts(architecture, tmp_path).to(dtype)
    x, index, weights = routed(experts)
    x = x.to(dtype)
    with torch.no_grad():
        nothing = experts(x, torch.full_like(index, experts.num_experts), weights)
        assert (nothing.shape, nothing.dtype) == (x.shape, dtype)
        assert not nothing.any()
        none = experts(x[:0], index[:0], weights[:0])
        assert (none.shape, none.dtype) == ((0, x.shape[1]), dtype)


def test_gradients_pass_packed_experts_with_dropped_slots(tmp_path: Path) -> None:
    experts = packed_experts("olmoe", tmp_path)
    x, index, weights = routed(experts, tokens=4)
    index[1:3, 1] = experts.num_experts
    index[3] = experts.num_experts
    x.requires_grad_(), weights.requires_grad_()
    experts(x, index, weights).square().sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert torch.equal(weights.grad != 0, index < experts.num_experts)
    assert x.grad[:3].abs().sum(1).gt(0).all()
    assert not x.grad[3].any()


def test_values_keep_their_type_whatever_the_activations_are(folder: Path) -> None:
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        model = compress.load(folder, dtype=dtype, device="cpu")
        kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        assert {p.dtype for p in model.parameters()} == {kind}
        layer = model.get_submodule(UP.removesuffix("."))
        assert (layer.values.dtype, layer.meta.dtype) == (torch.bfloat16, torch.uint8)
        assert model.get_submodule("model.layers.0.self_attn.q_proj").bias.dtype == kind
        assert model(tiny_configs.tokens()).logits.dtype == kind


def test_a_dense_folder_is_not_for_this_loader(llama: Case) -> None:
    with pytest.raises(UsageError, match=r"not a packed checkpoint.*load it with transformers"):
        compress.load(llama.source)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def set_code(tensors: dict[str, Tensor], byte: int) -> None:
    tensors[UP + "meta"][2, 1] = byte


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "version": (lambda f: edit_config(f, version=7), "version 7; this release reads versions up to 2"),
    "truncated": (cut, "truncated"),
    "a packed tensor is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(UP + "meta")),
        rf"{UP}meta, a part of .* is missing",
    ),
    "another tensor is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        r"are missing \(model\.norm\.weight\)",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({UP + "values": t[UP + "values"][:, :-2].contiguous()})),
        rf"{UP}values is BF16 \[48, 14\]; config.json makes it BF16 \[48, 16\]",
    ),
    "type": (
        lambda f: edit_tensors(f, lambda t: t.update({UP + "values": t[UP + "values"].float()})),
        rf"{UP}values is F32 .*; config.json makes it BF16",
    ),
    "illegal code": (lambda f: edit_tensors(f, lambda t: set_code(t, 0x55)), r"up_proj.weight: row 2: metadata byte 1 is 0x55"),
    "the model has no such matrix": (
        lambda f: (
            edit_config(f, matrices={"model.layers.9.x.weight": {"shape": [8, 8], "contracted_dim": -1}}),
            edit_tensors(f, lambda t: t.update(_extra())),
        ),
        r"no parameter model.layers.9.x.weight",
    ),
    "the model has another shape": (
        lambda f: (
            edit_config(f, matrices={"model.layers.1.mlp.up_proj.weight": {"shape": [8, 8], "contracted_dim": -1}}),
            edit_tensors(f, lambda t: t.update(_extra(UP))),
        ),
        r"up_proj.weight is \[48, 32\] in the model, but \[8, 8\] where it is packed",
    ),
    "config.json": (lambda f: (f / "config.json").write_text("{"), "not a packed checkpoint"),
}


def _extra(prefix: str = "model.layers.9.x.") -> dict[str, Tensor]:
    packed = pack(sparse(8, 8), torch.bfloat16)
    return {f"{prefix}values": packed.values, f"{prefix}meta": packed.meta}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_of_a_folder_has_its_own_message(folder: Path, fault: str) -> None:
    damage, message = BROKEN[fault]
    damage(folder)
    with pytest.raises(CompressError, match=message):
        compress.load(folder, device="cpu")


def test_a_shard_that_is_not_there_is_named(llama: Case, tmp_path: Path) -> None:
    llama.loaded.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copy(llama.mask, tmp_path / "mask.safetensors")
    from compress.export.packed24 import export_packed
    from compress.export.source import open_source

    export_packed(open_source(str(tmp_path / "shards")), tmp_path / "out", masks=llama.masks)
    lost = sorted((tmp_path / "out").glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(UsageError, match=f"names {lost.name}, which is not there"):
        compress.load(tmp_path / "out", device="cpu")


def test_import_compress_stays_light_and_has_load() -> None:
    code = (
        "import sys, compress\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "try: compress.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "assert callable(compress.load)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packed_tensors_are_smaller_by_what_the_format_says(llama: Case, folder: Path) -> None:
    packed = tensors_of(folder)
    parts = sum(tensor.nbytes for name, tensor in packed.items() if name.endswith((".values", ".meta")))
    weights = sum(mask.numel() for mask in llama.masks.masks.values())
    assert parts == weights * 9 // 8
