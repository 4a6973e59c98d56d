"""Learn the masks of one block of a network from its inputs and the outputs it should have, without the rest of the network.

A step takes `batch` sequences of the cached inputs, in micro-batches, and moves the logits of this block alone down the gradient of
the squared distance between what the masked block puts out, y, and the target t of the same token. Memory is that of one block:
its logits, their gradient and Adam's two moments, and the activations of one micro-batch.

Some of the sequences are held out. A mask that does not lower the error on them is not taken: the block then keeps its prior.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from compress_kernels.gumbel import stream_key
from maskllm.errors import MaskError
from maskllm.objective import weight_regulariser
from maskllm.optim import logit_dtype
from maskllm.parametrization import MaskState, MaskTarget, attach, detach
from maskllm.patterns import Pattern
from maskllm.settings import LearnSettings
from maskllm.update import LogitUpdates, check_settings

Objective = Literal["mse", "token-normalised", "channel-normalised"]

# What is divided by counts as at least this share of its mean (of the channels: of their median), so that a token of zeros and a channel
# that is constant divide nothing.
_TOKEN_FLOOR, _CHANNEL_FLOOR = 1e-6, 1e-4
_TINY = 1e-30


@dataclass(frozen=True)
class BlockError:
    """Squared distance of outputs y from targets t, relative to the targets' own squared norm.

    mse: `sum_i ||y_i - t_i||^2 / sum_i ||t_i||^2` over tokens i. token: the mean over tokens of `||y_i - t_i||^2 / ||t_i||^2`.
    channel: the same as `token` after each channel of y and t was divided by its standard deviation over the training targets.

    Some tokens of a language model (often the first) have hidden states a hundred times as long as the others: they decide `mse`.
    Some channels are far larger than the others, which the next normalisation and its weights undo: they decide `token`.
    """

    mse: float
    token: float
    channel: float

    def by(self, objective: Objective) -> float:
        """The one of them that is learned from."""
        return {"mse": self.mse, "token-normalised": self.token, "channel-normalised": self.channel}[objective]


@dataclass(frozen=True)
class BlockStep:
    """What one step did: `loss` is the objective with soft masks, before the step; `seconds` of this step."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float


@dataclass(frozen=True)
class BlockResult:
    """What became of a block. `before` and `after` are held-out errors of the prior and of the learned masks, as hard masks.

    masks: bool, on the CPU, by the targets' names: the learned ones where `improved`, else the prior.
    """

    masks: dict[str, Tensor]
    before: BlockError
    after: BlockError
    improved: bool


@contextmanager
def applied(targets: Iterable[MaskTarget], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the weights are multiplied by their masks (bool, of the weight's shape), in place; then they are what they were."""
    weights = [(getattr(t.module, t.parameter_name), masks[t.name]) for t in targets]
    originals = [weight.detach().clone() for weight, _ in weights]
    try:
        with torch.no_grad():
            for weight, mask in weights:
                weight.mul_(mask.to(weight.device))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), original in zip(weights, originals, strict=True):
                weight.copy_(original)


@dataclass
class BlockLearner:
    """Learns masks over the `targets` of one block.

    forward(i, x): what the block makes of the hidden states x of micro-batch i, with that micro-batch's other arguments; in
    evaluation mode, on the device of the weights, its parameters frozen. inputs, outputs: one float tensor a micro-batch,
    `[micro_batch, length, hidden]`, on any device; the outputs are the targets t. The last `held_out` micro-batches are not
    trained on. logits start the masks; prior are the masks (bool, of the weights' shapes) that are kept unless the error falls.
    frozen: by name, bool over the leading dimensions of a weight (`[]` the whole of it, `[experts]`): these parts keep the prior.

    Of the settings, the weights of the language model's losses have no meaning here. Two runs with equal arguments end in the same
    bits; give every block a seed of its own.
    Raises MaskError when micro-batches and held-out ones do not fit the settings or each other.
    """

    forward: Callable[[int, Tensor], Tensor]
    targets: list[MaskTarget]
    pattern: Pattern
    settings: LearnSettings
    objective: Objective
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    held_out: int
    logits: dict[str, Tensor]
    prior: dict[str, Tensor]
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        s = self.settings
        if s.batch % s.micro_batch or any(len(x) != s.micro_batch for x in (self.inputs[0], self.inputs[-1])):
            raise MaskError(
                f"a step takes {s.batch} sequences in micro-batches of {s.micro_batch}, and the inputs come {len(self.inputs[0])} at "
                "once: make micro_batch a divisor of batch and the number of sequences of each input"
            )
        if len(self.inputs) != len(self.outputs) or not 0 < self.held_out < len(self.inputs):
            raise MaskError(
                f"{len(self.inputs)} micro-batches of inputs, {len(self.outputs)} of outputs and {self.held_out} held out do not fit: "
                "as many inputs as outputs are needed, at least one to learn from and one held out"
            )
        check_settings(s, s.batch // s.micro_batch)
        self.device = getattr(self.targets[0].module, self.targets[0].parameter_name).device
        self._trained = len(self.inputs) - self.held_out
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a step may reach into the next pass
        self._measure_targets()
        with applied(self.targets, self.prior):
            self.before = self.error()
        self.state = MaskState(
            self.pattern, s.parametrization, seed=s.seed, noise=s.noise, hard=s.hard, penalised=s.regulariser > 0
        )
        start = {name: logits.to(logit_dtype(s.state)) for name, logits in self.logits.items()}
        self.weights = attach(self.targets, self.state, start)
        self.updates = LogitUpdates(self.weights, self.state, s, s.batch // s.micro_batch, self.frozen)

    def close(self) -> None:
        """Take the masks off the block; its weights are untouched."""
        detach(self.targets)
        self.updates.close()

    def tensors(self) -> dict[str, Tensor]:
        """Logits and moments as they are kept: what `load` continues from."""
        return self.updates.tensors()

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue after `step` steps from what `tensors` returned then. Raises MaskError when that was with another `state`."""
        self.updates.load(step, tensors)
        self.step = step

    def steps(self) -> Iterator[BlockStep]:
        """Train, one record a step, from the current step to the last. The caller may stop between records and keep `tensors`."""
        while self.step < self.settings.steps:
            yield self._step()

    def finish(self) -> BlockResult:
        """Measure the masks that the logits stand for, and decide between them and the prior. Takes the masks off the block."""
        learned = {name: mask.hard() for name, mask in self.weights.items()}
        for name, kept in self.frozen.items():
            learned[name][kept.to(self.device)] = self.prior[name].to(self.device)[kept.to(self.device)]
        self.close()
        with applied(self.targets, learned):
            after = self.error()
        improved = after.by(self.objective) < self.before.by(self.objective)
        chosen = learned if improved else self.prior
        return BlockResult({t.name: chosen[t.name].cpu() for t in self.targets}, self.before, after, improved)

    @torch.no_grad()
    def error(self) -> BlockError:
        """Error on the held-out micro-batches of the block as it is now."""
        sums = torch.zeros(5, dtype=torch.float64)  # distances, norms, errors by token, errors by channel, tokens
        for i in range(self._trained, len(self.inputs)):
            difference, target = self._outputs(i)
            by_token, by_channel = (self._errors(difference, target, o) for o in ("token-normalised", "channel-normalised"))
            parts = difference.square(), target.square(), by_token, by_channel, torch.ones_like(by_token)
            sums += torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()
        distances, norms, by_token, by_channel, tokens = sums.tolist()
        return BlockError(distances / max(norms, _TINY), by_token / tokens, by_channel / tokens)

    def _step(self) -> BlockStep:
        s, began = self.settings, time.perf_counter()
        progress, count = self.step / s.steps, s.batch // s.micro_batch
        self.state.step, self.state.tau, self.state.kappa = self.step, s.temperature.at(progress), s.scale.at(progress)
        rate = s.rate(self.step)
        self.updates.set_rate(rate)
        total = torch.zeros((), device=self.device)
        for index in range(count):
            self.state.micro_batch = index
            error = self._errors(*self._outputs(self._sample(self.step * count + index)), self.objective).mean()
            total += error.detach() / count
            if s.step_in_backward or index == count - 1:
                self._check_finite(float(total))  # before an update, so that the logits of the last good step can still be kept
            penalty = s.regulariser * (1 - progress) * weight_regulariser(self.weights.values()) if s.regulariser else 0.0
            ((error - penalty) / count).backward()
        norm = self.updates.finish()
        self.step += 1
        return BlockStep(self.step, float(total), rate, float(norm), time.perf_counter() - began)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise MaskError(f"the loss is {loss} at step {self.step}: lower the learning rate, or lengthen the warm-up")

    def _outputs(self, i: int) -> tuple[Tensor, Tensor]:
        """`y - t` and `t` of a micro-batch: float32 `[micro_batch, length, hidden]`."""
        target = self.outputs[i].to(self.device).float()
        # A fused weight is read once an expert; the mask is made once a pass.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16), parametrize.cached():
            found = self.forward(i, self.inputs[i].to(self.device))
        return found.float() - target, target

    def _errors(self, difference: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """The error of every token: float32 `[micro_batch, length]`; its mean over the training tokens is the objective."""
        if objective == "mse":
            return difference.square().sum(-1) / self._mean_square
        floor = _TOKEN_FLOOR * self._mean_square
        if objective == "channel-normalised":
            difference, target = difference * self._gain, target * self._gain
            floor = _TOKEN_FLOOR * self._gained_mean_square
        return difference.square().sum(-1) / target.square().sum(-1).clamp(min=floor)

    def _measure_targets(self) -> None:
        """What the errors are relative to, over the training tokens: `mean ||t||^2`, and one over each channel's standard deviation."""
        hidden, tokens = self.outputs[0].shape[-1], 0
        total, squares = torch.zeros(2, hidden, dtype=torch.float64)
        for i in range(self._trained):
            target = self.outputs[i].to(self.device).float().flatten(0, -2)
            total += target.sum(0, dtype=torch.float64).cpu()
            squares += target.square().sum(0, dtype=torch.float64).cpu()
            tokens += len(target)
        variance = squares / tokens - (total / tokens).square()
        variance.clamp_(min=max(_CHANNEL_FLOOR * float(variance.median()), _TINY))
        self._mean_square = max(float(squares.sum()) / tokens, _TINY)
        self._gained_mean_square = max(float((squares / variance).sum()) / tokens, _TINY)
        self._gain = variance.rsqrt().float().to(self.device)

    def _sample(self, number: int) -> int:
        """The micro-batch of sample `number`: every pass goes through all of them once, each in an order of its own."""
        return int(self._order(number // self._trained)[number % self._trained])

    def _draw_order(self, epoch: int) -> Tensor:
        key = stream_key(self.settings.seed, epoch) >> 1  # a generator's seed has 63 bits
        return torch.randperm(self._trained, generator=torch.Generator().manual_seed(key))
