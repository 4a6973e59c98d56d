"""Masks over real modules: Linear, fused experts, weights that are contracted along dimension -2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_kernels.gumbel import Draw, stream_key
from maskllm.errors import MaskError
from maskllm.gumbel import Parametrization, hard_mask, logit_width, soft_masked_weight
from maskllm.parametrization import MaskState, MaskTarget, attach, detach
from maskllm.patterns import Pattern

PATTERN = Pattern(2, 4)


class Holder(nn.Module):
    """A bare parameter, as fused experts and GPT-2's Conv1D have it."""

    def __init__(self, *shape: int, contracted: int) -> None:
        super().__init__()
        self.contracted = contracted
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:  # x: [..., K]
        weight = self.weight if self.contracted == -2 else self.weight.transpose(-1, -2)
        return x @ weight


CASES = {
    "linear": (lambda: nn.Linear(8, 6), -1, (8,)),
    "fused": (lambda: Holder(3, 6, 8, contracted=-1), -1, (3, 5, 8)),
    "conv1d": (lambda: Holder(8, 6, contracted=-2), -2, (8,)),
    "fused transposed": (lambda: Holder(3, 8, 6, contracted=-2), -2, (3, 5, 8)),
}


def logits_for(weight: Tensor, dim: int, parametrization: Parametrization = "patterns") -> Tensor:
    last = weight.movedim(dim, -1)
    return torch.randn(*last.shape[:-1], last.shape[-1] // 4, logit_width(PATTERN, parametrization)) * 0.02


def build(case: str, **options: Any) -> tuple[Any, MaskTarget, MaskState, Tensor, Tensor]:
    torch.manual_seed(3)
    make, dim, shape = CASES[case]
    module: Any = make()
    target = MaskTarget("w", module, "weight", dim)
    state = MaskState(PATTERN, "patterns", **options)
    return module, target, state, logits_for(module.weight, dim), torch.randn(shape)


@pytest.mark.parametrize("case", CASES)
def test_the_network_computes_with_the_drawn_mask(case: str) -> None:
    module, target, state, logits, x = build(case, seed=5, step=3, micro_batch=2, tau=0.5, kappa=50.0)
    original = module.weight.detach().clone()
    attach([target], state, {"w": logits})
    draw = Draw(0.5, 50.0, stream_key(5, 3, 2, 0))
    last = original.movedim(target.contracted_dim, -1)
    expected = soft_masked_weight(logits, last, PATTERN, "patterns", draw)[0].movedim(-1, target.contracted_dim)
    assert torch.equal(module.weight, expected)
    kept = (module.weight / original).movedim(target.contracted_dim, -1).unflatten(-1, (-1, 4)).sum(-1)
    torch.testing.assert_close(kept, torch.full_like(kept, 2.0), atol=1e-4, rtol=0)
    with state.using("final"):
        final = hard_mask(logits, PATTERN, "patterns").movedim(-1, target.contracted_dim)
        assert torch.equal(module.weight, original * final)
    assert module(x).shape[-1] == 6


@pytest.mark.parametrize("case", CASES)
def test_dense_mode_and_detaching_give_back_the_original_bits(case: str) -> None:
    module, target, state, logits, x = build(case)
    keys, original, before = set(module.state_dict()), module.weight.detach().clone(), module(x).detach()
    owner, parameter = type(module), module.weight
    masks = attach([target], state, {"w": logits})
    assert not torch.equal(module(x), before)
    with state.using("dense"):
        assert torch.equal(module(x), before)
    assert state.mode == "soft"
    module(x).sum().backward()
    with torch.no_grad():
        masks["w"].logits += 1
    detach([target])
    assert type(module) is owner
    assert set(module.state_dict()) == keys
    assert module.weight is parameter
    assert torch.equal(module.weight, original)
    assert torch.equal(module(x), before)
    detach([target])  # nothing is left to take away


@pytest.mark.parametrize("case", CASES)
def test_only_logits_get_a_gradient(case: str) -> None:
    module, target, state, logits, x = build(case, penalised=True)
    masks = attach([target], state, {"w": logits})
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        if name.endswith("logits"):
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 0
        elif name.endswith("original"):
            assert parameter.grad is None
            assert not parameter.requires_grad
    norm = masks["w"].squared_norm
    assert norm is not None
    torch.testing.assert_close(norm, module.weight.square().sum())


def test_draws_differ_by_step_micro_batch_layer_and_seed_and_repeat() -> None:
    layers: list[Any] = [nn.Linear(8, 6), nn.Linear(8, 6)]
    targets = [MaskTarget(str(i), layer, "weight", -1) for i, layer in enumerate(layers)]
    state = MaskState(PATTERN, "scores")
    attach(targets, state, {t.name: torch.zeros(6, 2, 4) for t in targets})
    seen: list[Tensor] = []
    for seed, step, micro in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        state.seed, state.step, state.micro_batch = seed, step, micro
        for layer in layers:
            mask = layer.weight / layer.parametrizations.weight.original
            assert torch.equal(mask, layer.weight / layer.parametrizations.weight.original)
            seen.append(mask.detach())
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(seen) for b in seen[:i])
    state.noise = False
    assert torch.allclose(layers[0].weight, layers[0].parametrizations.weight.original / 2)


def test_under_autocast_the_weight_is_made_in_its_dtype() -> None:
    module, target, state, logits, x = build("linear")
    attach([target], state, {"w": logits})
    with torch.autocast("cpu", torch.bfloat16):
        assert module.weight.dtype == torch.bfloat16
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.weight.dtype == torch.float32


def test_a_dimension_that_m_does_not_divide_is_named() -> None:
    layer = nn.Linear(10, 4)
    with pytest.raises(MaskError, match="proj: its contracted dimension is 10"):
        attach([MaskTarget("proj", layer, "weight", -1)], MaskState(PATTERN, "patterns"), {"proj": torch.zeros(4, 2, 6)})


def test_logits_of_the_wrong_shape_are_refused_before_anything_is_attached() -> None:
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    targets = [MaskTarget("a", first, "weight", -1), MaskTarget("b", second, "weight", -1)]
    with pytest.raises(MaskError, match=r"b: logits \(4, 2, 4\) were given, but its masks take \(4, 2, 6\)"):
        attach(targets, MaskState(PATTERN, "patterns"), {"a": torch.zeros(4, 2, 6), "b": torch.zeros(4, 2, 4)})
    assert type(first) is nn.Linear
    assert type(second) is nn.Linear
