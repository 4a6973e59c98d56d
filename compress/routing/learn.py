"""Train the routers of a frozen model: distillation from the model unpruned, and a price on the experts that run.

    loss = KL(unpruned || pruned) + lambda * activation

activation is the share of the routed experts that is expected to run. lambda is a number of the recipe, or the Lagrange multiplier of
`activation = target`, found by dual ascent. Divergences differ by orders of magnitude between models, so the multiplier moves by a factor:

    lambda <- lambda * exp(rate * (activation - target))

and what a step is charged leads it by a term in proportion, exp(lead * (activation - target)), which damps the swings of pure
integration. The target falls from 1 to its value over the first steps.

A training pass runs every expert and scales its routing weight by the drawn mask: what a dropped slot would have given is what its
gradient is made of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compress.errors import CompressError
from compress.recipe_routing import RoutingLearnSection
from compress.routing.gate import Relaxation, Routing
from compress.routing.router import TopAnyRouter
from maskllm.checkpoint import CheckpointStore
from maskllm.gumbel import Schedule
from maskllm.head import find_head, head_loss, without_head
from maskllm.objective import token_loss
from maskllm.recompute import checkpoint_blocks

_LEAD, _LEAD_LIMIT = 10.0, 2.0  # the proportional part of the multiplier, and the exponent that it may reach


@dataclass(frozen=True)
class RoutingStep:
    """What one step did. loss, kl in nats a token; activation: expected share of the experts; target: what it was to be in this step."""

    step: int
    tokens: int
    loss: float
    kl: float
    activation: float
    target: float
    multiplier: float
    temperature: float
    learning_rate: float
    gradient_norm: float
    seconds: float


class _Student(nn.Module):
    """The model together with its routers, which are no submodules of it: what several processes average gradients over."""

    def __init__(self, model: nn.Module, routers: list[TopAnyRouter]) -> None:
        super().__init__()
        self.model, self.routers = model, nn.ModuleList(routers)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@dataclass
class RoutingLearner:
    """Trains the routers of an attached routing. Every router must be a TopAnyRouter; the model's own parameters are frozen.

    target: the share of experts that is to run, or None when `settings.sparsity` gives their price. seed: of the Gumbel noise.
    """

    model: nn.Module
    routing: Routing
    settings: RoutingLearnSection
    target: float | None
    accelerator: Accelerator
    seed: int = 0
    store: CheckpointStore | None = None
    step: int = field(default=0, init=False)
    log_multiplier: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        s = self.settings
        share = s.micro_batch * self.accelerator.num_processes
        if s.batch % share:
            raise CompressError(
                f"batch {s.batch} is not a multiple of micro_batch {s.micro_batch} times {self.accelerator.num_processes} processes"
            )
        self._micro_batches = s.batch // share
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.log_multiplier = math.log(s.sparsity or s.dual_start)
        self.routers = {g.mixture.name: g.decision for g in self.routing.gates if isinstance(g.decision, TopAnyRouter)}
        device = self.accelerator.device
        for router in self.routers.values():
            router.to(device)
        self.parameters = [p for router in self.routers.values() for p in router.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.learning_rate, betas=(0.9, 0.99), weight_decay=s.weight_decay)
        self._prepared = self.accelerator.prepare(_Student(self.model, list(self.routers.values())))
        self._head = find_head(self.model)
        blocks = [gate.mixture.block for gate in self.routing.gates] if s.checkpoint_activations else []
        self._release = checkpoint_blocks(blocks)
        self._temperature = Schedule(s.temperature.start, s.temperature.end, s.temperature.curve)

    def close(self) -> None:
        """Leave the model as it was, with the routers as they are."""
        self._release()

    # --- checkpoints

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        if self.store is None or not self.accelerator.is_main_process:
            return
        tensors = {"log_multiplier": torch.tensor(self.log_multiplier, dtype=torch.float64)}
        for name, parameter in self._named():
            tensors[f"value/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        self.store.save(self.step, tensors)

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one. Raises MaskError when it belongs to another run."""
        loaded = self.store.load() if self.store else None
        if loaded is None:
            return False
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(loaded.tensors[f"value/{name}"])
                if f"step/{name}" in loaded.tensors:
                    state = {key: loaded.tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                    self.optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
        self.log_multiplier = float(loaded.tensors["log_multiplier"])
        self.step = loaded.step
        return True

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for mixture, router in self.routers.items():
            for name, parameter in router.named_parameters():
                yield f"{mixture}.{name}", parameter

    # --- training

    def steps(self, batches: Callable[[int, int], Tensor]) -> Iterator[RoutingStep]:
        """Train, one record a step. batches(step, size) -> int64 `[size, length]`: the same tokens whenever it is asked for a step."""
        while self.step < self.settings.steps:
            yield self._step(batches)

    def _step(self, batches: Callable[[int, int], Tensor]) -> RoutingStep:
        s, began, progress = self.settings, time.perf_counter(), self.step / self.settings.steps
        rate, temperature, target = self._rate(), self._temperature.at(progress), self._target(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batches(self.step, s.batch)
        mine = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        for index, ids in enumerate(mine.split(s.micro_batch)):
            number = (self.step * self._micro_batches + index) * self.accelerator.num_processes + self.accelerator.process_index
            last = index == self._micro_batches - 1
            drawn = self.routing.relaxed(temperature, self.seed * 1_000_003 + number)
            # The backward pass lies within, too: blocks that are computed again there draw the same masks again.
            with nullcontext() if last else self.accelerator.no_sync(self._prepared), drawn as relaxation:
                loss, parts = self.losses(ids.to(self.accelerator.device), relaxation, target)
                self.accelerator.backward(loss / self._micro_batches)
            sums += parts
        loss_sum, kl_sum, share, price = (self.accelerator.reduce(sums, "mean") / self._micro_batches).tolist()
        if not math.isfinite(loss_sum):
            raise CompressError(f"the loss is {loss_sum} at step {self.step}: lower learn.learning_rate, or lengthen the warm-up")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, s.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.target is not None:
            self.log_multiplier += s.dual_rate * (share - target)
        self.step += 1
        return RoutingStep(
            self.step,
            self.step * batch.numel(),
            loss_sum,
            kl_sum,
            share,
            target,
            price,
            temperature,
            rate,
            float(norm),
            time.perf_counter() - began,
        )

    def losses(self, ids: Tensor, relaxation: Relaxation, target: float) -> tuple[Tensor, Tensor]:
        """Loss of one micro-batch, int64 `[sequences, length]`, to go backward from, and the record (loss, KL, activation, price), float64.

        Call it within `routing.relaxed`, which gives the relaxation.
        """
        head = self._head
        relaxation.shares.clear()
        apart: AbstractContextManager[list[Tensor]] = without_head(head) if head is not None else nullcontext([])
        with apart as entered:
            with torch.no_grad(), self._precision(), self.routing.using("off"):
                teacher = self.model(input_ids=ids, use_cache=False).logits
            with self._precision():
                student = self._prepared(ids)
            drawn = list(relaxation.shares)
        if head is not None and student is not entered[-1]:
            self._head = None  # the network does more to its logits than the head does: it needs them whole
            return self.losses(ids, relaxation, target)
        if head is not None:
            dtype = torch.bfloat16 if self.settings.precision == "bf16" else head.weight.dtype
            divergence, _, kl = head_loss(student, teacher, head, dtype, ids, ce_weight=0, kl_weight=1)
        else:
            divergence, _, kl = token_loss(student, teacher, ids, ce_weight=0, kl_weight=1)
        widths = [gate.mixture.top_k for gate in self.routing.gates]
        share = torch.stack([x.to(ids.device) * k for x, k in zip(drawn, widths, strict=True)]).sum() / sum(widths)
        price = math.exp(self.log_multiplier)
        if self.target is not None:
            price *= math.exp(min(max(_LEAD * (float(share.detach()) - target), -_LEAD_LIMIT), _LEAD_LIMIT))
        loss = divergence + price * share
        record = torch.tensor([float(loss.detach()), float(kl), float(share.detach()), price], dtype=torch.float64)
        return loss, record.to(ids.device)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _target(self, progress: float) -> float:
        """The share that is to run in a step: falls from 1 over the first part of the run."""
        if self.target is None:
            return 0.0
        done = min(1.0, progress / self.settings.approach) if self.settings.approach else 1.0
        return 1 + (self.target - 1) * done

    def _rate(self) -> float:
        s = self.settings
        ramp = round(s.warmup * s.steps)
        if self.step < ramp:
            return s.learning_rate * (self.step + 1) / (ramp + 1)
        progress = (self.step - ramp) / max(s.steps - ramp, 1)
        return s.learning_rate * (s.final_rate + (1 - s.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))
