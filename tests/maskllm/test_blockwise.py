"""Learning one block: its errors against sums by hand, resumable to the bit, and never worse than the prior."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_kernels.gumbel import Draw
from maskllm.blockwise import BlockError, BlockLearner, BlockResult, applied
from maskllm.errors import MaskError
from maskllm.gumbel import Schedule, prior_logits, soft_masked_weight
from maskllm.parametrization import MaskTarget
from maskllm.patterns import Pattern
from maskllm.settings import LearnSettings

PATTERN = Pattern(2, 4)
HIDDEN, LENGTH, TRAINED, HELD_OUT = 16, 6, 6, 6  # micro-batches of two sequences
BASE: dict[str, Any] = {
    "steps": 10,
    "batch": 4,
    "micro_batch": 2,
    "parametrization": "scores",
    "temperature": Schedule(1.0, 0.1, "exponential"),
    "scale": Schedule(100.0, 100.0),
    "learning_rate": 0.01,
    "noise": False,
    "regulariser": 0.0,
    "weight_decay": 0.0,
    "clip": 0.0,
    "bf16": False,
}


class Experts(nn.Module):
    """Three fused experts; a token goes to the one that the first channel of `route` names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, HIDDEN, HIDDEN) / 4)

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        choice = (route[..., 0] * 10).long().remainder(3)
        parts = [torch.where((choice == e).unsqueeze(-1), x @ self.weight[e].T, 0) for e in range(3)]
        return parts[0] + parts[1] + parts[2]


class Block(nn.Module):
    """A residual block, as decoders have them: attention is left out, the rest is there."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False), nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.experts = Experts() if experts else None

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.down(torch.nn.functional.silu(self.up(x)))
        return y if self.experts is None else y + self.experts(y, x)


def setting(experts: bool = False, batch: int = 2) -> tuple[Block, list[MaskTarget], list[Tensor]]:
    torch.manual_seed(0)
    block = Block(experts).requires_grad_(False)
    with torch.no_grad():
        block.up.weight.mul_(2)
        block.down.weight.mul_(2)
    targets = [MaskTarget("up", block.up, "weight", -1), MaskTarget("down", block.down, "weight", -1)]
    if block.experts is not None:
        targets.append(MaskTarget("experts", block.experts, "weight", -1))
    total = torch.randn(2 * (TRAINED + HELD_OUT), LENGTH, HIDDEN)
    return block, targets, list(total.split(batch))


def prior_of(targets: list[MaskTarget]) -> dict[str, Tensor]:
    """The worst mask: whatever is learned is better."""
    return {t.name: PATTERN.best_of(-getattr(t.module, t.parameter_name).abs()) for t in targets}


def learner(
    experts: bool = False, objective: str = "token-normalised", outputs: list[Tensor] | None = None, **changes: Any
) -> Any:
    frozen, start_noise = changes.pop("frozen", {}), changes.pop("start_noise", False)
    settings = LearnSettings(**{**BASE, **changes})
    block, targets, inputs = setting(experts, settings.micro_batch)
    prior = prior_of(targets)
    logits = {
        name: prior_logits(
            mask,
            PATTERN,
            settings.parametrization,
            strength=1 if start_noise else 3,
            std=0.01,
            noise=start_noise,
            generator=torch.Generator().manual_seed(1),
        )
        for name, mask in prior.items()
    }
    outputs = outputs or [block(x) for x in inputs]
    held = 2 * HELD_OUT // settings.micro_batch
    return BlockLearner(
        lambda i, x: block(x), targets, PATTERN, settings, objective, inputs, outputs, held, logits, prior, frozen
    )


def finish(run: BlockLearner) -> BlockResult:
    list(run.steps())
    return run.finish()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(found: Tensor, target: Tensor, training: Tensor) -> BlockError:
    """The errors as the docstring of BlockError has them, token by token: `[tokens, hidden]`."""
    spread = training.double().std(0, correction=0)

    def squares(scale: Tensor | float) -> list[tuple[float, float]]:
        pairs = zip(found.double() / scale, target.double() / scale, strict=True)
        return [(float((y - t).square().sum()), float(t.square().sum())) for y, t in pairs]

    plain, scaled = squares(1.0), squares(spread)
    return BlockError(
        sum(d for d, _ in plain) / sum(n for _, n in plain),
        sum(d / n for d, n in plain) / len(plain),
        sum(d / n for d, n in scaled) / len(scaled),
    )


@pytest.mark.parametrize("objective", ["mse", "token-normalised", "channel-normalised"])
def test_errors_are_those_of_the_hard_masks_on_the_held_out_sequences(objective: str) -> None:
    result = finish(learner(objective=objective))
    block, targets, inputs = setting()
    held, training = (torch.cat(part).flatten(0, 1) for part in (inputs[-HELD_OUT:], inputs[:-HELD_OUT]))
    dense = block(held)
    for masks, error in ((prior_of(targets), result.before), (result.masks, result.after)):
        with applied(targets, masks):
            found = block(held)
        expected = by_hand(found, dense, block(training))
        assert error.mse == pytest.approx(expected.mse, rel=1e-5)
        assert error.token == pytest.approx(expected.token, rel=1e-5)
        assert error.channel == pytest.approx(expected.channel, rel=1e-5)
    before = result.before
    assert before.by(objective) == {"mse": before.mse, "token-normalised": before.token}.get(objective, before.channel)


@pytest.mark.parametrize("objective", ["mse", "token-normalised", "channel-normalised"])
@pytest.mark.parametrize("penalty", [0.0, 1e-4])
def test_the_first_loss_and_step_are_those_of_autograd(objective: str, penalty: float) -> None:
    """All sequences in one step, soft masks made here, the gradient by torch."""
    run = learner(objective=objective, batch=2 * TRAINED, regulariser=penalty, learning_rate=1e-3)
    start = {name: mask.logits.detach().clone() for name, mask in run.weights.items()}
    (record,) = (next(run.steps()),)
    block, _, inputs = setting()
    x = torch.cat(inputs[:TRAINED]).flatten(0, 1)
    target = block(x)
    logits = {name: value.requires_grad_() for name, value in start.items()}
    draw = Draw(tau=1.0, kappa=100.0)
    soft = {
        name: soft_masked_weight(logits[name], getattr(block, name).weight, PATTERN, "scores", draw)[0] for name in ("up", "down")
    }
    y = x + torch.nn.functional.silu(x @ soft["up"].T) @ soft["down"].T
    spread = target.std(0, correction=0) if objective == "channel-normalised" else 1.0
    distance, norm = ((y - target) / spread).square().sum(-1), (target / spread).square().sum(-1)
    loss = distance.sum() / norm.sum() if objective == "mse" else (distance / norm).mean()
    assert record.loss == pytest.approx(loss.item(), rel=1e-5)
    (loss - penalty * sum(w.square().sum() for w in soft.values())).backward()
    total = torch.cat([v.grad.flatten() for v in logits.values()])
    assert record.gradient_norm == pytest.approx(float(total.norm()), rel=1e-4)
    for name, mask in run.weights.items():  # Adam's first step is the rate by the sign of the gradient
        moved = mask.logits.detach() - logits[name].detach()
        large = logits[name].grad.abs() > 1e-5
        torch.testing.assert_close(moved[large], -1e-3 * logits[name].grad[large].sign(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("changes", [{}, {"parametrization": "patterns", "noise": True}, {"hard": True}, {"bf16": True}])
def test_learning_lowers_the_held_out_error(experts: bool, changes: dict[str, Any]) -> None:
    run = learner(experts, steps=40, **changes)
    result = finish(run)
    assert result.improved
    assert result.after.token < 0.8 * result.before.token
    for mask in result.masks.values():
        PATTERN.index_of(mask)
    assert not same(result.masks, run.prior)


def test_a_block_that_does_not_improve_keeps_its_prior() -> None:
    """Held-out targets are the prior's own outputs, so its error is 0 and any change makes it worse."""
    block, targets, inputs = setting()
    outputs = [block(x) for x in inputs]
    with applied(targets, prior_of(targets)):
        outputs[-HELD_OUT:] = [block(x) for x in inputs[-HELD_OUT:]]
    run = learner(steps=40, outputs=outputs)
    result = finish(run)
    assert not result.improved
    assert result.before.token == 0
    assert result.after.token > 0
    assert same(result.masks, run.prior)
    idle = finish(learner(learning_rate=1e-9))
    assert not idle.improved
    assert idle.after == idle.before


def test_large_tokens_decide_the_mse_and_not_the_token_error() -> None:
    """In a linear block inputs and targets scale together, so a token's own error does not depend on its size."""
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, HIDDEN, bias=False).requires_grad_(False)
    targets = [MaskTarget("w", linear, "weight", -1)]
    prior = prior_of(targets)
    logits = {"w": prior_logits(prior["w"], PATTERN, "scores", strength=3, std=0.01, noise=False)}
    errors = []
    for factor in (1.0, 1000.0):
        inputs = list(torch.randn(8, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(2)).split(2))
        for x in inputs:
            x[:, 0] *= factor
        outputs = [linear(x) for x in inputs]
        run = BlockLearner(
            lambda i, x: linear(x), targets, PATTERN, LearnSettings(**BASE), "mse", inputs, outputs, 1, dict(logits), prior
        )
        run.close()
        errors.append(run.before)
    large = inputs[-1][:, 0]
    with applied(targets, prior):
        alone = by_hand(linear(large), outputs[-1][:, 0], outputs[0].flatten(0, 1))
    assert errors[0].token == pytest.approx(errors[1].token, rel=1e-5)
    assert errors[1].mse == pytest.approx(alone.mse, rel=1e-4)
    assert errors[0].mse != pytest.approx(alone.mse, rel=1e-2)


def test_large_channels_decide_the_token_error_and_not_the_channel_error() -> None:
    block, targets, inputs = setting()
    scale = torch.ones(HIDDEN)
    scale[3] = 1000.0
    made, errors = learner(), []
    made.close()
    for factor in (torch.ones(HIDDEN), scale):
        outputs = [block(x) * factor for x in inputs]
        run = BlockLearner(
            lambda i, x, factor=factor: block(x) * factor,
            targets,
            PATTERN,
            LearnSettings(**BASE),
            "mse",
            inputs,
            outputs,
            HELD_OUT,
            {name: mask.logits.detach() for name, mask in made.weights.items()},
            made.prior,
        )
        run.close()
        errors.append(run.before)
    assert errors[0].channel == pytest.approx(errors[1].channel, rel=1e-4)
    assert errors[0].token != pytest.approx(errors[1].token, rel=1e-2)


LEAN = {"state": "8bit", "step_in_backward": True, "clip": 0.01, "clip_by": "weight", "micro_batch": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise": True, "parametrization": "patterns", "warmup": 0.3, "clip": 0.01},
        {"state": "bfloat16", "clip": 0.01},  # two micro-batches, summed in bfloat16
        {"noise": True, **LEAN},
    ],
    ids=["standard", "noise", "bfloat16", "lean"],
)
def test_interrupted_at_any_step_it_ends_in_the_same_bits(changes: dict[str, Any]) -> None:
    whole = learner(**changes)
    losses = [record.loss for record in whole.steps()]
    expected, tensors = whole.tensors(), whole.finish()
    for stop in range(1, 10):
        first = learner(**changes)
        for record in first.steps():
            if record.step == stop:
                break
        kept = {name: value.clone() for name, value in first.tensors().items()}
        first.close()
        second = learner(**changes)
        second.load(stop, kept)
        assert [record.loss for record in second.steps()] == losses[stop:]
        assert same(second.tensors(), expected)
        result = second.finish()
        assert same(result.masks, tensors.masks)
        assert result.after == tensors.after


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_a_step_in_the_backward_pass_is_bitwise_the_step_after_it(state: str, clip: float) -> None:
    options = {"state": state, "clip": clip, "clip_by": "weight", "noise": True, "micro_batch": 4, "steps": 4}
    frozen = {"experts": torch.tensor([False, True, False])}
    after, within = (learner(True, **options, step_in_backward=early, frozen=frozen) for early in (False, True))
    start = within.weights["experts"].logits.detach().clone()
    for a, b in zip(after.steps(), within.steps(), strict=True):
        assert (a.loss, a.gradient_norm) == (b.loss, b.gradient_norm)
    assert same(after.tensors(), within.tensors())
    assert torch.equal(within.weights["experts"].logits[1], start[1])
    assert not torch.equal(within.weights["experts"].logits[0], start[0])


@pytest.mark.parametrize("state", ["bfloat16", "8bit"])
def test_narrow_states_are_kept_narrow_and_learn_as_float32_does(state: str) -> None:
    gained = {}
    for kept in ("float32", state):
        run = learner(steps=40, state=kept)
        list(run.steps())
        tensors = run.tensors()
        result = run.finish()
        gained[kept] = result.before.token - result.after.token
    logits = sum(value.numel() for key, value in tensors.items() if key.startswith("logits/"))
    held = sum(value.numel() * value.itemsize for value in tensors.values())
    assert held == pytest.approx(logits * {"bfloat16": 6, "8bit": 4}[state], rel=0.02)
    assert gained[state] > 0.9 * gained["float32"] > 0


def test_clipping_by_weight_is_clipping_to_its_share() -> None:
    plain, clipped = (learner(clip=clip, clip_by="weight", batch=2, learning_rate=1e-9, steps=1) for clip in (0.0, 1e-3))
    for run in (plain, clipped):
        list(run.steps())
    moments, total = plain.tensors(), sum(mask.logits.numel() for mask in plain.weights.values())
    for name, mask in plain.weights.items():
        gradient = 10 * moments[f"exp_avg/{name}"]
        limit = 1e-3 * (mask.logits.numel() / total) ** 0.5
        assert float(gradient.norm()) > limit
        torch.testing.assert_close(
            clipped.tensors()[f"exp_avg/{name}"], 0.1 * gradient * limit / gradient.norm(), rtol=1e-3, atol=1e-12
        )


def test_a_state_of_another_kind_is_refused() -> None:
    saved, other = learner(state="bfloat16"), learner(state="8bit")
    with pytest.raises(MaskError, match="not that of a 8bit state"):
        other.load(1, saved.tensors())


def test_seeds_decide_the_order_and_the_noise() -> None:
    runs = [learner(seed=seed, noise=True) for seed in (1, 1, 2)]
    losses = [[record.loss for record in run.steps()] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    run = learner()
    passes = [[run._sample(i) for i in range(epoch * TRAINED, (epoch + 1) * TRAINED)] for epoch in range(4)]
    assert all(sorted(p) == list(range(TRAINED)) for p in passes)  # every micro-batch once a pass, none that is held out
    assert len({tuple(p) for p in passes}) > 1


def test_micro_batches_make_one_large_step() -> None:
    """When a step takes all of the sequences, however they are cut up."""
    small, large = (learner(micro_batch=size, batch=2 * TRAINED, steps=2) for size in (2, 12))
    assert (len(small.inputs), len(large.inputs)) == (12, 2)
    for one, other in zip(small.steps(), large.steps(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)


def test_frozen_parts_keep_the_prior_even_from_a_noisy_start() -> None:
    frozen = {"experts": torch.tensor([False, True, False]), "up": torch.tensor(True)}
    run = learner(True, steps=30, frozen=frozen, start_noise=True)
    assert not torch.equal(run.weights["up"].hard(), run.prior["up"])  # the start is not the prior
    start = {name: mask.logits.detach().clone() for name, mask in run.weights.items()}
    list(run.steps())
    assert torch.equal(run.weights["up"].logits, start["up"])
    assert torch.equal(run.weights["experts"].logits[1], start["experts"][1])
    assert not torch.equal(run.weights["experts"].logits[0], start["experts"][0])
    result = run.finish()
    assert result.improved
    assert torch.equal(result.masks["up"], run.prior["up"])
    assert torch.equal(result.masks["experts"][1], run.prior["experts"][1])
    assert not torch.equal(result.masks["experts"][0], run.prior["experts"][0])
    assert not torch.equal(result.masks["down"], run.prior["down"])


def test_weights_are_untouched() -> None:
    run = learner(True)
    finish(run)
    block, _, _ = setting(True)
    after = {name: value for target in run.targets for name, value in target.module.named_parameters(prefix=target.name)}
    assert same(after, {"up.weight": block.up.weight, "down.weight": block.down.weight, "experts.weight": block.experts.weight})


def test_applied_masks_come_off_whatever_happens() -> None:
    block, targets, _ = setting()
    with torch.no_grad():
        block.up.weight[0, 0] = -0.0
    before, prior = block.up.weight.clone(), prior_of(targets)

    def fail() -> None:
        with applied(targets, prior):
            assert torch.equal(block.up.weight, before * prior["up"])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(block.up.weight, before)
    assert torch.signbit(block.up.weight[0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 2, "batch": 3}, "divisor of batch"),
        ({"outputs": [torch.zeros(2, LENGTH, HIDDEN)]}, "1 of outputs"),
        ({"step_in_backward": True}, "set micro_batch to 4"),
        ({"step_in_backward": True, "micro_batch": 4, "clip": 1.0}, "clip_by to weight"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        learner(**changes)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    block, _, inputs = setting()
    outputs = [block(x) for x in inputs]
    outputs[0] = torch.full_like(outputs[0], torch.nan)
    with pytest.raises(MaskError, match="the loss is nan at step"):
        finish(learner(outputs=outputs))


def test_a_target_of_zeros_divides_nothing() -> None:
    block, _, inputs = setting()
    outputs = [block(x) for x in inputs]
    for t in outputs:
        t[:, 0] = 0
        t[..., 1] = 3
    result = finish(learner(outputs=outputs, objective="channel-normalised"))
    assert max(result.after.mse, result.after.token, result.after.channel) < float("inf")
    assert result.masks.keys() == {"up", "down"}
