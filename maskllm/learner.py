"""The training loop: learn the masks of a frozen network end to end, on `accelerate`.

A step takes `batch` sequences, in micro-batches; every micro-batch draws its own mask, all with the temperature and scale of the
step. Only the logits are trained (AdamW). Without noise the whole run is a function of the recipe and the text.

Three settings save memory, each on its own: `state` keeps logits and moments in fewer bytes, `step_in_backward` moves a weight's logits
as soon as its gradient is there, so that no two gradients exist at once, and `checkpoint_activations` keeps neither activations
nor masked weights between the forward and the backward pass of a block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskllm.checkpoint import CheckpointStore
from maskllm.errors import MaskError
from maskllm.head import find_head, head_loss, without_head
from maskllm.objective import token_loss, weight_regulariser
from maskllm.optim import logit_dtype
from maskllm.parametrization import MaskState, MaskTarget, attach, detach
from maskllm.patterns import Pattern
from maskllm.recompute import checkpoint_blocks
from maskllm.settings import LearnSettings
from maskllm.sharding import Sharding
from maskllm.storage import difference
from maskllm.update import LogitUpdates, check_settings


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
    """Learns masks over `targets` of `model`, starting from `logits`; `prior` is the mask that flips are counted against.

    logits: emptied, so that they are not kept beside those that move; converted to the dtype that the settings keep them in.
    blocks: the modules that `checkpoint_activations` recomputes, in any order. shard: what several processes share out
    (`maskllm.sharding`); unless it is nothing, all of them must call every method, in the same order. With `weights` the model may be on the
    CPU: of the masked weights each process takes only its own rows to its device. Raises MaskError for settings that do not go together.
    """

    model: nn.Module
    targets: list[MaskTarget]
    pattern: Pattern
    settings: LearnSettings
    logits: dict[str, Tensor]
    prior: dict[str, Tensor]
    accelerator: Accelerator
    store: CheckpointStore | None = None
    blocks: Sequence[nn.Module] = ()
    shard: Sharding = "none"
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        s = self.settings
        share = s.micro_batch * self.accelerator.num_processes
        if s.batch % share:
            raise MaskError(
                f"batch {s.batch} is not a multiple of micro_batch {s.micro_batch} times {self.accelerator.num_processes} processes; change one"
            )
        self._micro_batches = s.batch // share
        self._shard: Sharding = self.shard if self.accelerator.num_processes > 1 else "none"
        self._sharded = self._shard != "none"
        check_settings(s, self._micro_batches)
        self._check_memory_settings()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.state = MaskState(
            self.pattern,
            s.parametrization,
            seed=s.seed,
            noise=s.noise,
            hard=s.hard,
            penalised=s.regulariser > 0,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            shard=self._shard,
        )
        start = {name: self.logits.pop(name).to(logit_dtype(s.state)) for name in list(self.logits)}
        self.weights = attach(self.targets, self.state, start, self.accelerator.device if self._sharded else None)
        if self._sharded and any(p.device != self.accelerator.device for p in self.model.parameters()):
            self.model.to(self.accelerator.device)  # what is left of it
        self._head = find_head(self.model)
        self.updates = LogitUpdates(self.weights, self.state, s, self._micro_batches)
        # Precision is this class's own business (autocast below): accelerate's would turn the logits back into float32 copies.
        # Shards average their gradients themselves, with nothing around the model.
        self._prepared = self.model if self._sharded else self.accelerator.prepare(self.model)
        # Fused experts read their weight once an expert; the mask is made once a pass, or by `checkpoint_blocks` once a block.
        fused = any(len(mask.shape) > 2 for mask in self.weights.values())
        self._cached = fused and not s.checkpoint_activations
        self._release = checkpoint_blocks(self.blocks if s.checkpoint_activations else ())

    def _check_memory_settings(self) -> None:
        s = self.settings
        early = s.step_in_backward or (s.state != "float32" and self._micro_batches > 1)
        if self.accelerator.num_processes > 1 and early and not self._sharded:
            raise MaskError(
                "step_in_backward, and a sum over micro-batches in a state other than float32, act before gradients are averaged over processes; "
                "use one process, share the logits out (shard), or set step_in_backward to false and state to float32"
            )
        if self._shard == "weights" and not s.checkpoint_activations:
            raise MaskError(
                "weights can be shared out (shard) with checkpoint_activations alone: without it autograd keeps every masked weight whole, in each "
                "process, until the backward pass"
            )
        if s.checkpoint_activations and not self.blocks:
            raise MaskError("checkpoint_activations needs the blocks of the network: give `blocks`")

    def close(self, *, gather: bool = True) -> None:
        """Take the masks off the model; its weights are untouched.

        Weights that were shared out are gathered to where they were before, which all processes must do together. gather=False leaves them
        and their masks as they are, for processes that do not end together or will not use the model again.
        """
        if gather or self._shard != "weights":
            detach(self.targets)
        self._release()
        self.updates.close()

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """The masks the logits stand for now, bool, on the CPU."""
        return {name: mask.hard().cpu() for name, mask in self.weights.items()}

    @contextmanager
    def final(self) -> Iterator[None]:
        """Within it the model computes with the masks the logits stand for now, made once: for measuring amid training."""
        # Under `checkpoint_activations` block by block: masked copies of all weights at once would undo what it saves.
        once: AbstractContextManager[None] = nullcontext() if self.settings.checkpoint_activations else parametrize.cached()
        with self.state.using("final"), torch.no_grad(), once:
            yield

    def flipped(self) -> dict[str, tuple[int, int]]:
        """Groups of each weight that differ from the prior now, and how many there are."""
        counts: dict[str, tuple[int, int]] = {}
        for target in self.targets:  # one at a time: no second set of masks exists
            now, prior = {target.name: self.weights[target.name].hard()}, {target.name: self.prior[target.name]}
            counts |= difference(now, prior, self.pattern, {target.name: target.contracted_dim})
        return counts

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one. Raises MaskError when it belongs to another run or another `state`."""
        loaded = self.store.load() if self.store else None
        if loaded is None:
            return False
        self.updates.load(loaded.step, loaded.tensors)
        self.step = loaded.step
        return True

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        if self.store is None or not (self.accelerator.is_main_process or self._sharded):
            return
        tensors = self.updates.tensors()
        if self.accelerator.is_main_process:
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
        self.updates.set_rate(rate)
        decayed = s.regulariser * (1 - progress)
        batch = batches(self.step, s.batch)
        mine = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(4, device=self.accelerator.device)
        for index, ids in enumerate(mine.split(s.micro_batch)):
            self.state.micro_batch = index * self.accelerator.num_processes + self.accelerator.process_index
            last = index == self._micro_batches - 1
            # Gradients are averaged over the processes once a step, in the last backward pass.
            with nullcontext() if last or self._sharded else self.accelerator.no_sync(self._prepared):
                total, parts = self.losses(ids.to(self.accelerator.device), decayed)
                sums += parts
                if s.step_in_backward:
                    self._check_finite(float(total.detach()))
                self.backward(total)
        sums = self.accelerator.reduce(sums, "mean") / self._micro_batches
        loss, ce, kl, penalty = sums.tolist()
        self._check_finite(loss)
        norm = self.updates.finish()
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

    def _check_finite(self, loss: float) -> None:
        """Before an update, so that the logits of the last good step can still be saved."""
        if not math.isfinite(loss):
            raise MaskError(f"the loss is {loss} at step {self.step}: lower the learning rate, or lengthen the warm-up")

    def losses(self, ids: Tensor, decayed: float) -> tuple[Tensor, Tensor]:
        """Loss of one micro-batch, int64 `[sequences, length]`, to go backward from, and the record (loss, cross-entropy, KL, penalty)."""
        s, head, teacher = self.settings, self._head, None
        apart: AbstractContextManager[list[Tensor]] = without_head(head) if head is not None else nullcontext([])
        once: AbstractContextManager[None] = parametrize.cached() if self._cached else nullcontext()
        with apart as entered:
            if s.kl_weight:
                with torch.no_grad(), self.state.using("dense"), self._precision():
                    teacher = self._forward(ids)
            with self._precision(), once:
                student = self._forward(ids)
        if (
            head is not None and student is not entered[-1]
        ):  # the network does more to its logits than the head: it needs them whole
            self._head = None
            return self.losses(ids, decayed)
        weights = {"ce_weight": s.ce_weight, "kl_weight": s.kl_weight}
        if head is not None:
            dtype = torch.bfloat16 if s.bf16 else head.weight.dtype
            loss, ce, kl = head_loss(student, teacher, head, dtype, ids, **weights)
        else:
            loss, ce, kl = token_loss(student, teacher, ids, **weights)
        penalty = torch.zeros_like(ce)
        if self.state.penalised:
            penalty = decayed * weight_regulariser(self.weights.values())
            loss = loss - penalty
        return loss, torch.stack([loss.detach().float(), ce, kl, penalty.detach().float()])

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch's share of the step; under `step_in_backward` also the update."""
        (loss / self._micro_batches).backward()

    def _forward(self, ids: Tensor) -> Tensor:
        out: Any = self._prepared(input_ids=ids, use_cache=False)
        return out.logits

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.bf16)
