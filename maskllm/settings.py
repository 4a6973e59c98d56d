"""How to learn: what the learner end to end, the learner of one block and the optimizer of both read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from maskllm.gumbel import Parametrization, Schedule
from maskllm.optim import StateFormat


@dataclass(frozen=True)
class LearnSettings:
    """How to learn. Defaults are the paper's but for the number of steps and the batch; see `compress.recipe` for the tool's own.

    steps, batch: optimizer steps, and sequences a step over all processes. micro_batch: sequences a forward pass and process.
    learning_rate: peak, in logit units; `warmup` is the share of steps that ramps up to it, then cosine to `final_rate` of it.
    regulariser: the paper's lambda, decayed linearly to 0. ce_weight, kl_weight: cross-entropy and distillation.
    clip, clip_by: the gradient's norm is cut to `clip` over the whole network, or weight by weight, each to its share
    `clip * sqrt(n_weight / n_network)` of n logits, which is the same where all gradients are equally large; 0 does not clip.
    state: how logits and moments are kept (`maskllm.optim`). step_in_backward: move a weight's logits as soon as their gradient is there; a norm over
    the network is then not to be had, nor a sum over micro-batches. checkpoint_activations: recompute every block in the backward pass.
    """

    steps: int = 2000
    batch: int = 256
    micro_batch: int = 1
    parametrization: Parametrization = "patterns"
    noise: bool = True
    hard: bool = False
    temperature: Schedule = Schedule(4.0, 0.05)
    scale: Schedule = Schedule(100.0, 500.0)
    learning_rate: float = 5e-4
    warmup: float = 0.0
    final_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    clip_by: Literal["network", "weight"] = "network"
    regulariser: float = 1e-5
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    bf16: bool = True
    state: StateFormat = "float32"
    step_in_backward: bool = False
    checkpoint_activations: bool = False
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        ramp = round(self.warmup * self.steps)
        if step < ramp:
            return self.learning_rate * (step + 1) / (ramp + 1)
        progress = (step - ramp) / max(self.steps - ramp, 1)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))
