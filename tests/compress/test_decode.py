"""Decoding fused: the network's own numbers where it is used, and the network's own way wherever something else is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
import transformers
from packed_fixtures import case_of, make_case
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache

import compress
from compress.decode import FusedForward, FusedHead, fuse, unfuse
from compress.models import load_model
from compress_kernels.native import native
from compress_kernels.sparse24.decode import Decoder

BUILDERS: dict[str, Callable[..., Any]] = {
    "llama": tiny_configs.llama,
    "llama with biases": lambda **c: tiny_configs.llama(attention_bias=True, mlp_bias=True, **c),
    "qwen3": tiny_configs.qwen3,
    "qwen2": lambda **c: tiny_configs.build(transformers.Qwen2Config, **c),
    "mistral": lambda **c: tiny_configs.build(transformers.MistralConfig, sliding_window=None, **c),
}


@pytest.fixture(autouse=True)
def kernels() -> None:
    if native("sparse24").library is None:
        pytest.skip(native("sparse24").reason)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens in the cache at every fused step."""
    seen: list[int] = []
    own = Decoder.step

    def step(self: Decoder, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, tokens: int) -> Tensor:
        seen.append(tokens)
        return own(self, x, cos, sin, cache, tokens)

    monkeypatch.setattr(Decoder, "step", step)
    return seen


def packed(tmp_path: Path, name: str = "llama", values: str = "bf16", **options: Any) -> Any:
    BUILDERS[name]().save_pretrained(tmp_path / "source")
    case_of(tmp_path / "source", tmp_path / "mask.safetensors").pack(tmp_path / "packed", values=values, **options)
    return compress.load(tmp_path / "packed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_case(folder, "llama").pack(folder / "packed", values="bf16")
    return folder / "packed"


@pytest.fixture
def model(saved: Path) -> Any:
    return compress.load(saved)


def prompt(batch: int = 1, length: int = 9) -> Tensor:
    return tiny_configs.tokens(batch, length)


@torch.no_grad()
def logits(model: Any, ids: Tensor, first: int = 4) -> Tensor:
    """Of a prompt of `first` tokens and then token by token."""
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :first], past_key_values=cache).logits]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, ids.shape[1])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
def test_a_network_decodes_as_it_did(tmp_path: Path, steps: list[int], name: str, values: str) -> None:
    model = packed(tmp_path, name, values)
    ids = prompt(length=20)
    fused = logits(model, ids)
    assert steps == list(range(4, 20)), "every token after the prompt"
    unfuse(model)
    steps.clear()
    torch.testing.assert_close(fused, logits(model, ids), rtol=1e-4, atol=1e-4)
    assert not steps
    assert fuse(model)
    logits(model, ids)
    assert steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_at_least_as_close(model: Any, steps: list[int], dtype: torch.dtype) -> None:
    """Fewer numbers are rounded: the fused tokens are nearer to the float32 network than those of torch's operations, or as near."""
    ids = prompt(length=20)
    exact = logits(model, ids)
    model.to(dtype)
    steps.clear()
    fused = logits(model, ids).float()
    assert len(steps) == 16, "moving the model to another type does not end it"
    unfuse(model)
    own = logits(model, ids).float()
    assert (fused - exact)[:, 4:].norm() <= 1.2 * (own - exact)[:, 4:].norm()


@torch.no_grad()
def test_generate_gives_the_same_text(model: Any, steps: list[int]) -> None:
    options: dict[str, Any]
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        texts = []
        for change in (fuse, unfuse):
            change(model)
            torch.manual_seed(1)
            texts.append(model.generate(prompt(), max_new_tokens=40, min_new_tokens=40, **options).tolist())
        assert texts[0] == texts[1], options
    assert len(steps) == 2 * 39  # beams are a batch


def test_the_text_of_a_dense_masked_model(tmp_path: Path, steps: list[int]) -> None:
    case = make_case(tmp_path, "qwen3")
    case.pack(tmp_path / "packed", values="fp32")
    dense: Any = case.loaded.model
    with torch.no_grad():
        for name in case.masks.masks:
            dense.get_parameter(name).copy_(case.meant(name))
    fast: Any = compress.load(tmp_path / "packed")
    with torch.no_grad():
        texts = [m.generate(prompt(), max_new_tokens=50, min_new_tokens=50).tolist() for m in (dense, fast)]
    assert steps
    assert texts[0] == texts[1]


def test_room_in_the_cache_grows(model: Any, steps: list[int]) -> None:
    model.config.max_position_embeddings = 400
    ids = tiny_configs.tokens(1, 300)
    fused = logits(model, ids, 2)
    assert len(steps) == 298
    unfuse(model)
    torch.testing.assert_close(fused, logits(model, ids, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_caches_stay_apart(model: Any, steps: list[int]) -> None:
    """A copy of a cache, a part of it, and one made of its tensors go on by themselves, whatever the first one writes after."""
    ids, other = prompt(length=12), prompt(length=12).flip(1)
    whole = logits(model, torch.cat([ids[:, :8], other[:, :4]], 1))[:, 8:]
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    for i in range(4, 8):
        model(ids[:, i : i + 1], past_key_values=cache)
    deep, held = copy.deepcopy(cache), cache.layers
    layers = DynamicCache([(layer.keys, layer.values) for layer in held])  # type: ignore[union-attr]
    for i in range(8, 12):
        model(ids[:, i : i + 1], past_key_values=cache)
    steps.clear()
    for branch in (deep, layers):
        found = [model(other[:, i : i + 1], past_key_values=branch).logits for i in range(4)]
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert steps == [8, 9, 10, 11] * 2
    cache.crop(-4)
    found = [model(other[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    # A longer piece after single tokens is a prompt again.
    cache.crop(-4)
    torch.testing.assert_close(model(other[:, :4], past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_asks_for_more_goes_the_networks_way(model: Any, saved: Path, steps: list[int]) -> None:
    ids = prompt(length=8)

    def run(batch: int = 1, length: int = 8, **options: Any) -> Any:
        cache = options.pop("cache", None) or DynamicCache(config=model.config)
        model(ids[:, :7].expand(batch, 7), past_key_values=cache)
        steps.clear()
        return model(ids[:, 7:length].expand(batch, length - 7), past_key_values=cache, **options)

    assert run().logits is not None
    assert steps == [7]
    run(attention_mask=torch.ones(1, 8, dtype=torch.long))
    assert steps == [7], "a mask that hides nothing"
    run(position_ids=torch.tensor([[7]]))
    assert steps == [7]
    padded = torch.ones(1, 8, dtype=torch.long)
    padded[0, 0] = 0
    options: dict[str, Any]
    for options in (
        {"batch": 2},
        {"attention_mask": padded},
        {"output_hidden_states": True},
        {"cache": StaticCache(config=model.config, max_cache_len=16)},
        {"cache": DynamicCache(config=transformers.MistralConfig(sliding_window=4, num_hidden_layers=2))},
    ):
        run(**options)
        assert not steps, options
    assert len(run(output_hidden_states=True).hidden_states) == 3
    assert isinstance(run(return_dict=False), tuple)
    with torch.enable_grad():
        run()
        assert not steps, "gradients"
    model.train()
    run()
    assert not steps, "training"
    model.eval()
    model.config._attn_implementation = "flex_attention"
    assert not model.base_model.forward._asks_for_no_more(ids[:, :1], None, None, {})


@torch.no_grad()
def test_what_somebody_changed_inside_is_not_passed_by(model: Any, steps: list[int]) -> None:
    ids, seen = prompt(length=10), []
    inner = model.model.layers[1].mlp.up_proj
    logits(model, ids)
    assert steps
    steps.clear()
    handle = inner.register_forward_hook(lambda *_: seen.append(1))
    logits(model, ids)
    assert not steps
    assert len(seen) == 7
    handle.remove()
    logits(model, ids)
    assert steps
    # A hook that comes while a cache is in use.
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    model(ids[:, 4:5], past_key_values=cache)
    steps.clear()
    handle = inner.register_forward_hook(lambda *_: seen.append(1))
    model(ids[:, 5:6], past_key_values=cache)
    assert not steps
    assert len(seen) == 8
    handle.remove()

    own = inner.forward
    inner.forward = lambda x: 0 * own(x)
    logits(model, ids)
    assert not steps, "a patched forward"
    del inner.forward
    expected = logits(model, ids)
    assert steps
    steps.clear()
    model.model.layers[1].mlp.up_proj = nn.Sequential(inner)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert not steps, "another module"


@torch.no_grad()
def test_what_traces_the_network_sees_its_operations(model: Any, steps: list[int]) -> None:
    ids = prompt(length=6)
    expected = logits(model, ids)
    steps.clear()
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), ids), expected, rtol=1e-4, atol=1e-4)
    assert not steps
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(ids[:, 4:5], past_key_values=cache)
    assert counter.get_total_flops() > 0
    assert not steps


def test_new_weights_are_seen(model: Any, steps: list[int]) -> None:
    ids = prompt(length=8)
    first = logits(model, ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.q_proj.values"] *= -1
    state["model.layers.1.input_layernorm.weight"] *= 2
    model.load_state_dict(state, assign=True)
    fused = logits(model, ids)
    assert len(steps) == 8
    unfuse(model)
    torch.testing.assert_close(fused, logits(model, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fused, first, atol=1e-2)


def test_copies_and_saved_models_are_whole(model: Any, saved: Path, tmp_path: Path, steps: list[int]) -> None:
    ids = prompt(length=8)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    steps.clear()
    torch.testing.assert_close(logits(twin, ids), expected)
    assert len(steps) == 4
    twin.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(compress.load(tmp_path / "again"), ids), expected)
    assert not any("forward" in name or "fused" in name for name in twin.state_dict())


def test_where_there_is_no_kernel_nothing_is_fused(tmp_path: Path, steps: list[int]) -> None:
    changes: dict[str, Any]
    for name, changes in (("gemma3", {}), ("qwen3_moe", {}), ("llama", {"hidden_act": "gelu"})):
        case = make_case(tmp_path / name / str(len(changes)), name, 1, **changes)
        case.pack(tmp_path / name / "packed")
        model = compress.load(tmp_path / name / "packed")
        assert not fuse(model)
        assert not isinstance(model.base_model.forward, FusedForward)
        logits(model, prompt())
        assert not steps
    dense = load_model(str(case.source), tokenizer=False).model
    assert not fuse(dense)


def test_a_dense_model_by_the_same_code(saved: Path, steps: list[int]) -> None:
    """The control: float32 is not taken, and bfloat16 only if it is asked for."""
    source, ids = saved.parent / "source", prompt(length=20)
    assert not fuse(load_model(str(source), tokenizer=False).model, control=True)
    dense = load_model(str(source), tokenizer=False, dtype="bfloat16").model
    own = logits(dense, ids)
    assert fuse(dense, control=True)
    assert not steps
    fused = logits(dense, ids)
    assert len(steps) == 16
    torch.testing.assert_close(fused.float(), own.float(), rtol=0.05, atol=0.2)


@torch.no_grad()
def test_the_head(model: Any) -> None:
    head = model.lm_head
    assert isinstance(head.forward, FusedHead)
    for shape in ((1, 1, 32), (1, 3, 32), (2, 1, 32), (32,)):
        x = torch.randn(shape)
        torch.testing.assert_close(head(x), nn.functional.linear(x, head.weight), rtol=1e-5, atol=1e-5)
    x = torch.randn(1, 1, 64)[..., ::2]
    torch.testing.assert_close(head(x), nn.functional.linear(x, head.weight), rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        x = torch.randn(1, 1, 32, requires_grad=True)
        head(x).sum().backward()
        assert x.grad is not None
