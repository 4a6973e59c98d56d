"""The training loop: learn the masks of a frozen network end to end, on `accelerate`.

A step takes `batch` sequences, in micro-batches; every micro-batch draws its own mask, all with the temperature and scale of the
step. Only the logits are trained (AdamW). Without noise the whole run is a function of the recipe and the text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskllm.checkpoint import CheckpointStore
from maskllm.errors import MaskError
from maskllm.gumbel import Parametrization, Schedule
from maskllm.objective import token_loss, weight_regulariser
from maskllm.parametrization import MaskState, MaskTarget, attach, detach
from maskllm.patterns import Pattern


@dataclass(frozen=True)
class LearnSettings:
    """How to learn. Defaults are the paper's but for the number of steps and the batch; see `compress.recipe` for the tool's own.

    steps, batch: optimizer steps, and sequences a step over all processes. micro_batch: sequences a forward pass and process.
    learning_rate: peak, in logit units; `warmup` is the share of steps that ramps up to it, then cosine to `final_rate` of it.
    regulariser: the paper's lambda, decayed linearly to 0. ce_weight, kl_weight: cross-entropy and distillation.
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
    regulariser: float = 1e-5
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    bf16: bool = True
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        ramp = round(self.warmup * self.steps)
        if step < ramp:
            return self.learning_rate * (step + 1) / (ramp + 1)
        progress = (step - ramp) / max(self.steps - ramp, 1)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class StepRecord:
    """What one step did. Losses in nats a token; `tokens` since the start of the run; `seconds` of this step."""

    step: int
    tokens: int
    loss: float
    cross_entropy: float
    kl: float
    regulariser: float
    learning_rate: float
    temperature: float
    scale: float
    gradient_norm: float
    seconds: float


@dataclass
class Learner:
    """Learns masks over `targets` of `model`, starting from `logits`; `prior` is the mask that flips are counted against."""

    model: nn.Module
    targets: list[MaskTarget]
    pattern: Pattern
    settings: LearnSettings
    logits: dict[str, Tensor]
    prior: dict[str, Tensor]
    accelerator: Accelerator
    store: CheckpointStore | None = None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        s = self.settings
        share = s.micro_batch * self.accelerator.num_processes
        if s.batch % share:
            raise MaskError(
                f"batch {s.batch} is not a multiple of micro_batch {s.micro_batch} times {self.accelerator.num_processes} processes; change one"
            )
        self._micro_batches = s.batch // share
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.state = MaskState(
            self.pattern, s.parametrization, seed=s.seed, noise=s.noise, hard=s.hard, penalised=s.regulariser > 0
        )
        self.weights = attach(self.targets, self.state, self.logits)
        self.optimizer = torch.optim.AdamW(
            [m.logits for m in self.weights.values()],
            lr=s.learning_rate,
            betas=s.betas,
            eps=s.eps,
            weight_decay=s.weight_decay,
            fused=True,
        )
        # Precision is this class's own business (autocast below): accelerate's would turn the logits back into float32 copies.
        self._prepared, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        # Fused experts read their weight once an expert; the mask is made once a pass.
        self._cached = any(getattr(t.module, t.parameter_name).dim() > 2 for t in self.targets)

    def close(self) -> None:
        """Take the masks off the model; its weights are untouched."""
        detach(self.targets)

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """The masks the logits stand for now, bool, on the CPU."""
        return {name: mask.hard().cpu() for name, mask in self.weights.items()}

    @contextmanager
    def final(self) -> Iterator[None]:
        """Within it the model computes with the masks the logits stand for now, made once: for measuring amid training."""
        with self.state.using("final"), torch.no_grad(), parametrize.cached():
            yield

    def flipped(self) -> dict[str, tuple[int, int]]:
        """Groups of each weight that differ from the prior now, and how many there are."""
        counts = {}
        for target in self.targets:
            now = self.weights[target.name].hard()
            differs = (now != self.prior[target.name].to(now.device)).movedim(target.contracted_dim, -1)
            groups = differs.unflatten(-1, (-1, self.pattern.m)).any(-1)
            counts[target.name] = (int(groups.sum()), groups.numel())
        return counts

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one. Raises MaskError when it belongs to another run."""
        loaded = self.store.load() if self.store else None
        if loaded is None:
            return False
        self.step = loaded.step
        for name, mask in self.weights.items():
            with torch.no_grad():
                mask.logits.copy_(loaded.tensors[f"logits/{name}"])
            self.optimizer.state[mask.logits] = {
                "step": torch.tensor(float(loaded.step)),
                "exp_avg": loaded.tensors[f"exp_avg/{name}"].to(mask.logits.device),
                "exp_avg_sq": loaded.tensors[f"exp_avg_sq/{name}"].to(mask.logits.device),
            }
        return True

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        if self.store is None or not self.accelerator.is_main_process:
            return
        tensors = {}
        for name, mask in self.weights.items():
            state = self.optimizer.state.get(mask.logits, {})
            tensors[f"logits/{name}"] = mask.logits.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}/{name}"] = state[key] if key in state else torch.zeros_like(mask.logits)
        self.store.save(self.step, tensors)

    def steps(self, batches: Callable[[int, int], Tensor]) -> Iterator[StepRecord]:
        """Train, one record a step, from the current step to the last.

        batches(step, size) -> int64 `[size, length]`: the same tokens whenever it is asked for the same step.
        The caller may stop between records (`save` first); nothing is lost.
        """
        while self.step < self.settings.steps:
            yield self._step(batches)

    def _step(self, batches: Callable[[int, int], Tensor]) -> StepRecord:
        s, began = self.settings, time.perf_counter()
        progress = self.step / s.steps
        self.state.step, self.state.tau, self.state.kappa = self.step, s.temperature.at(progress), s.scale.at(progress)
        rate = s.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        decayed = s.regulariser * (1 - progress)
        batch = batches(self.step, s.batch)
        mine = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(4, device=self.accelerator.device)
        for index, ids in enumerate(mine.split(s.micro_batch)):
            self.state.micro_batch = index * self.accelerator.num_processes + self.accelerator.process_index
            sums += self._micro_step(ids.to(self.accelerator.device), decayed)
        sums = self.accelerator.reduce(sums, "mean") / self._micro_batches
        loss, ce, kl, penalty = sums.tolist()
        if not math.isfinite(loss):  # before the update, so that the logits of the last good step can still be saved
            raise MaskError(f"the loss is {loss} at step {self.step}: lower the learning rate, or lengthen the warm-up")
        norm = torch.nn.utils.clip_grad_norm_([m.logits for m in self.weights.values()], s.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepRecord(
            self.step,
            self.step * batch.numel(),
            loss,
            ce,
            kl,
            penalty,
            rate,
            self.state.tau,
            self.state.kappa,
            float(norm),
            time.perf_counter() - began,
        )

    def _micro_step(self, ids: Tensor, decayed: float) -> Tensor:
        s = self.settings
        teacher = None
        if s.kl_weight:
            with torch.no_grad(), self.state.using("dense"), self._precision():
                teacher = self._forward(ids)
        with self._precision(), parametrize.cached() if self._cached else _nothing():
            student = self._forward(ids)
        loss, ce, kl = token_loss(student, teacher, ids, ce_weight=s.ce_weight, kl_weight=s.kl_weight)
        penalty = torch.zeros_like(ce)
        if self.state.penalised:
            penalty = decayed * weight_regulariser(self.weights.values())
            loss = loss - penalty
        self.accelerator.backward(loss / self._micro_batches)
        return torch.stack([loss.detach().float(), ce, kl, penalty.detach().float()])

    def _forward(self, ids: Tensor) -> Tensor:
        out: Any = self._prepared(input_ids=ids, use_cache=False)
        return out.logits

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.bf16)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
