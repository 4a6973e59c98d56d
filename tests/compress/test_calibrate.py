"""Captured inputs against independent ones; calibration block by block against passes of the whole model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import tiny_configs
import torch
from tiny_configs import BUILDERS, tokens
from torch import Tensor, nn
from torch.nn import functional

from compress.calibrate import walk_blocks
from compress.capture import InputCapture, InputStats
from compress.errors import CompressError, UsageError
from compress.walk import eager_experts
from compress.weights import WeightRef, find_weights

TOP_K = {"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "olmoe": 2, "deepseek_v2": 2, "deepseek_v3": 2, "gpt_oss": 2, "llama4": 1}


def batches(count: int = 2, length: int = 24) -> list[Tensor]:
    return [tokens(length=length, seed=seed) for seed in range(count)]


def whole_model(model: nn.Module, refs: list[WeightRef], data: list[Tensor]) -> dict[str, InputStats]:
    with torch.no_grad(), eager_experts(model), InputCapture(refs, gram=True) as capture:
        for batch in data:
            model(input_ids=batch, use_cache=False)
    return capture.stats()


def assert_same(a: dict[str, InputStats], b: dict[str, InputStats], names: list[str]) -> None:
    for name in names:
        assert a[name].tokens == b[name].tokens, name
        torch.testing.assert_close(a[name].sum_squares, b[name].sum_squares, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a[name].gram, b[name].gram, rtol=1e-4, atol=1e-4)


def independent_grams(model: nn.Module, refs: list[WeightRef], data: list[Tensor]) -> dict[str, tuple[int, Tensor]]:
    """The same sums by another road: module hooks for linear layers, the experts' routing worked out by hand."""
    sums: dict[str, tuple[int, Tensor]] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        count, gram = sums.get(name, (0, torch.zeros(x.shape[-1], x.shape[-1])))
        sums[name] = (count + len(x), gram + x.T @ x)

    handles = [
        ref.module.register_forward_pre_hook(lambda _, args, name=ref.name: add(name, args[0]))
        for ref in refs
        if ref.parameter.dim() == 2
    ]
    fused: dict[str, Any] = {ref.module_name: ref.module for ref in refs if ref.parameter.dim() == 3}
    for prefix, module in fused.items():

        def routed(module: Any, args: tuple[Any, ...], prefix: str = prefix) -> None:
            parts = {(r.expert, r.role): r for r in refs if r.module_name == prefix}
            for expert in range(module.num_experts):
                gate, up, down = (parts[expert, role] for role in ("gate_proj", "up_proj", "down_proj"))
                if len(args) == 1:  # Llama-4: a row of zeros is a token of another expert
                    x = args[0].view(module.num_experts, -1, 32)[expert]
                    x = x[x.abs().sum(-1) > 0]
                else:
                    x = args[0][(args[1] == expert).any(-1)]
                g, u = functional.linear(x, gate.view()), functional.linear(x, up.view())
                if hasattr(module, "limit"):
                    bias = module.gate_up_proj_bias[expert]
                    g, u = (g + bias[0::2]).clamp(max=module.limit), (u + bias[1::2]).clamp(-module.limit, module.limit)
                    inner = g * torch.sigmoid(module.alpha * g) * (u + 1)
                else:
                    inner = module.act_fn(g) * u
                for ref, inputs in ((gate, x), (up, x), (down, inner)):
                    add(ref.name, inputs)

        handles.append(module.register_forward_pre_hook(routed))
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("name", BUILDERS)
def test_captured_grams_equal_independent_ones(name: str) -> None:
    """The model runs its own experts implementation for the oracle and the eager one for the capture."""
    model = BUILDERS[name]()
    refs = find_weights(model)
    captured, oracle = whole_model(model, refs, batches()), independent_grams(model, refs, batches())
    assert list(captured) == [ref.name for ref in refs]
    for ref in refs:
        count, gram = oracle[ref.name]
        assert captured[ref.name].tokens == count, ref.name
        torch.testing.assert_close(captured[ref.name].gram, gram, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(captured[ref.name].sum_squares, gram.diagonal(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", BUILDERS)
def test_captured_inputs_reproduce_the_products(name: str) -> None:
    """Inputs times view, put back together, are the product that the model went on with."""
    model = BUILDERS[name]()
    refs = find_weights(model)
    checked: set[str] = set()

    class Checking(InputCapture):
        def _record(self, here: list[WeightRef], inputs: Tensor, stacked: bool) -> None:
            last["refs"], last["inputs"] = here, inputs

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            last.clear()
            output = super().__torch_function__(func, types, args, kwargs)
            if "refs" in last and not (name == "llama4" and last["refs"][0].expert is not None):
                x, bias = last["inputs"], next((a for a in (args[0], args[-1]) if isinstance(a, Tensor) and a.dim() == 1), 0)
                for ref in last["refs"]:
                    part = output - bias
                    assert torch.allclose(x @ ref.view().T, part[..., ref._rows], rtol=1e-3, atol=1e-4), ref.name
                    checked.add(ref.name)
            return output

    last: dict[str, Any] = {}
    with torch.no_grad(), eager_experts(model), Checking(refs, gram=False):
        model(input_ids=tokens(batch=4), use_cache=False)
    stacked = {ref.name for ref in refs if name == "llama4" and ref.expert is not None}  # one product for all of them
    starved = {n for n, s in whole_model(model, refs, [tokens(batch=4)]).items() if s.tokens == 0}
    assert checked == {ref.name for ref in refs} - stacked - starved


@pytest.mark.parametrize("name", TOP_K)
def test_experts_see_every_token_top_k_times(name: str) -> None:
    model = BUILDERS[name]()
    refs = find_weights(model)
    stats = whole_model(model, refs, batches())
    routed: dict[tuple[str, str], int] = defaultdict(int)
    for ref in refs:
        if ref.expert is not None:
            routed[ref.module_name, ref.role] += stats[ref.name].tokens
    assert set(routed.values()) == {TOP_K[name] * sum(batch.numel() for batch in batches())}


@pytest.mark.parametrize("name", BUILDERS)
def test_walking_an_unaltered_model_equals_whole_passes(name: str) -> None:
    """Batches of two lengths, of which the first is within the window of the sliding layers and the second beyond it."""
    model = BUILDERS[name]()
    refs, data = find_weights(model), [tokens(length=6), *batches()]
    before = model(input_ids=data[1]).logits
    walked: dict[str, InputStats] = {}
    for block, stats in walk_blocks(model, refs, data, gram=True):
        assert list(stats) == [ref.name for ref in refs if ref.layer == block.index]
        walked.update(stats)
    assert_same(walked, whole_model(model, refs, data), [ref.name for ref in refs])
    assert torch.equal(model(input_ids=data[1]).logits, before)  # nothing of the walk stays behind


@pytest.mark.parametrize("name", BUILDERS)
def test_a_block_is_measured_on_what_the_altered_one_before_it_puts_out(name: str) -> None:
    model = BUILDERS[name]()
    refs = find_weights(model)
    unaltered = whole_model(model, refs, batches())
    walked: dict[str, InputStats] = {}
    for block, stats in walk_blocks(model, refs, batches(), gram=True):
        walked.update(stats)
        for ref in refs:
            if block.index == ref.layer == 0:
                ref.view()[:, ::2] = 0
    altered = whole_model(model, refs, batches())
    second = [ref.name for ref in refs if ref.layer == 1]
    assert_same(walked, altered, second)
    first_input = second[0]
    assert not torch.allclose(altered[first_input].sum_squares, unaltered[first_input].sum_squares, rtol=1e-2)


def test_a_padding_mask_in_the_batch_counts() -> None:
    model = tiny_configs.gemma3()
    refs = find_weights(model)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :9] = 0
    padded = {"input_ids": tokens(), "attention_mask": mask}
    walked: dict[str, InputStats] = {}
    for _, stats in walk_blocks(model, refs, [padded], gram=True):
        walked.update(stats)
    with torch.no_grad(), InputCapture(refs) as capture:
        model(**padded, use_cache=False)
    assert_same(walked, capture.stats(), list(walked))
    plain = whole_model(model, refs, [tokens()])
    assert not torch.allclose(plain[refs[-1].name].sum_squares, walked[refs[-1].name].sum_squares, rtol=1e-2)


def test_a_starved_expert_has_zeros() -> None:
    model = tiny_configs.mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # equal scores: the top 2 are always the same two experts
    refs = find_weights(model)
    for _, stats in walk_blocks(model, refs, batches(), gram=True):
        starved = [s for name, s in stats.items() if ".experts." in name and s.tokens == 0]
        assert len(starved) == 2 * 3
        assert all(not s.sum_squares.any() and s.gram is not None and not s.gram.any() for s in starved)


def test_the_model_keeps_its_mode_its_experts_and_its_forward() -> None:
    model = tiny_configs.mixtral(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.set_experts_implementation("batched_mm")
    modes = [module.training for module in model.modules()]
    refs = find_weights(model)
    walk = walk_blocks(model, refs, batches(), gram=False)
    for _ in range(3):  # between two blocks as well as after the walk
        assert [module.training for module in model.modules()] == modes
        assert model.config._experts_implementation == "batched_mm"
        assert not any("forward" in vars(module) for module in model.modules())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        next(walk, None)
    again = [stats for _, stats in walk_blocks(model, refs, batches(), gram=False)]
    first = [stats for _, stats in walk_blocks(model, refs, batches(), gram=False)]
    assert all(
        torch.equal(a[k].sum_squares, b[k].sum_squares) for a, b in zip(again, first, strict=True) for k in a
    )  # no dropout
    with eager_experts(model):
        assert model.config._experts_implementation == "eager"
    assert model.config._experts_implementation == "batched_mm"


def test_sums_are_float32_under_a_bfloat16_model() -> None:
    model = tiny_configs.llama().to(torch.bfloat16)
    refs = find_weights(model)
    stats = whole_model(model, refs, batches(4))
    oracle = independent_grams(model, refs, batches(4))
    for ref in refs:
        found = stats[ref.name]
        assert found.gram is not None
        assert found.gram.dtype == found.sum_squares.dtype == torch.float32
        # The activations are rounded to bfloat16 (8 bits), the sums over them are not.
        torch.testing.assert_close(found.gram, oracle[ref.name][1], rtol=1e-5, atol=1e-4)


def test_blocks_run_twice_a_batch_and_once_more_for_the_first() -> None:
    model = tiny_configs.llama()
    runs = [0, 0]

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, args, output, index=index: count(index))
    list(walk_blocks(model, find_weights(model), batches(3), gram=False))
    assert runs == [1 + 3 + 3, 3]  # the last block's outputs are of no use to anyone


def test_selected_matrices_only_and_no_gram_unless_asked() -> None:
    model = tiny_configs.mixtral()
    refs = find_weights(model, ["model.layers.0.mlp.experts.1.*"])
    steps = list(walk_blocks(model, refs, batches(), gram=False))
    assert [block.index for block, _ in steps] == [0]
    assert set(steps[0][1]) == {ref.name for ref in refs}
    assert all(s.gram is None and s.tokens > 0 for s in steps[0][1].values())


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: functional.linear(x, w),
        lambda x, w: functional.linear(input=x, weight=w),
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, other=w.mT),
        lambda x, w: torch.mm(x, w.t()),
        lambda x, w: torch.addmm(torch.zeros(6), x, w.T),
        lambda x, w: torch.bmm(x[None], w.T[None]),
        lambda x, w: w @ x.T,
        lambda x, w: torch.stack([w @ row for row in x]),
        lambda x, w: x.matmul(w.T),
    ],
)
def test_every_way_of_writing_a_product_is_seen_once(product: Any) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6, bias=False))])
    (ref,) = find_weights(model)
    x = torch.randn(5, 4)
    with InputCapture([ref]) as capture:
        product(x, ref.parameter)
        product(x, torch.randn(6, 4))  # another weight of the same shape is not this one
    stats = capture.stats()[ref.name]
    assert stats.tokens == 5
    torch.testing.assert_close(stats.gram, x.T @ x)


def test_an_input_altered_in_place_between_two_products_is_not_taken_for_the_same() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)])])
    first, second = find_weights(model)
    x = torch.ones(3, 4)
    with torch.no_grad(), InputCapture([first, second]) as capture:
        first.module(x)
        x.mul_(2)
        second.module(x)
    assert capture.stats()[first.name].sum_squares.tolist() == [3.0] * 4
    assert capture.stats()[second.name].sum_squares.tolist() == [12.0] * 4


def test_inputs_that_are_not_finite_name_the_weight() -> None:
    model = tiny_configs.llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(CompressError, match=r"layers\.1\.self_attn\.q_proj.*not finite"):
        list(walk_blocks(model, find_weights(model), batches(), gram=False))
    assert model.config._experts_implementation is not None


def test_a_weight_in_no_product_is_an_error_and_not_a_starved_one() -> None:
    model = tiny_configs.llama()
    layer = model.model.layers[0].mlp
    layer.up_proj.forward = lambda x: torch.einsum("...i,oi->...o", x, layer.up_proj.weight)
    with pytest.raises(CompressError, match=r"layers\.0\.mlp\.up_proj.*exclude"):
        list(walk_blocks(model, find_weights(model), batches(), gram=False))


def test_a_model_that_changes_the_states_between_its_blocks_is_refused() -> None:
    model = tiny_configs.llama()
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    list(walk_blocks(model, find_weights(model), batches(), gram=False))  # a hook belongs to its block and does no harm

    class Between(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            states = self.embed_tokens(input_ids)
            position = self.rotary_emb(states, torch.arange(states.shape[1])[None])
            for block in self.layers:
                states = block(states, position_embeddings=position) * 0.5  # an addition is taken into account
            return states

    model.model.__class__ = Between
    with pytest.raises(CompressError, match="straight after"):
        list(walk_blocks(model, find_weights(model), batches(), gram=False))


def test_usage_errors() -> None:
    model = tiny_configs.llama()
    with pytest.raises(UsageError, match="outside the decoder blocks"):
        next(walk_blocks(model, find_weights(model, ["lm_head*"]), batches(), gram=False))
    with pytest.raises(UsageError, match="at least one batch"):
        next(walk_blocks(model, find_weights(model), [], gram=False))
