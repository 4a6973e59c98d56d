"""A step of the logits of many masks: gradients summed over micro-batches, clipped, and applied when they are due.

Learning end to end and block by block both move their logits here. Of the settings (`maskllm.settings`) it reads those of the optimizer, of
clipping and of memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskllm.errors import MaskError
from maskllm.optim import BLOCK, MaskAdamW, accumulate, squared_norm
from maskllm.parametrization import MaskState, WeightMask
from maskllm.settings import LearnSettings
from maskllm.sharding import Shard, summed


class LogitUpdates:
    """Moves the logits of `masks`, by name, `micro_batches` backward passes a step.

    state: the masks' own; its step and micro-batch number the random bits of a sum. frozen: by name, bool over the leading dimensions
    of the logits (`[]` all of them): their gradient counts as 0. The settings must have passed `check_settings`. Raises MaskError for logits
    that are not kept as the settings say.
    """

    def __init__(
        self,
        masks: Mapping[str, WeightMask],
        state: MaskState,
        settings: LearnSettings,
        micro_batches: int,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.masks, self.state, self.settings = masks, state, settings
        s = settings
        self._logits = [m.logits for m in masks.values()]
        counts = [
            math.prod(m.shape) // m.state.pattern.m * p.shape[-1] for m, p in zip(masks.values(), self._logits, strict=True)
        ]
        self._shares = [count / sum(counts) for count in counts]  # of the network's logits
        self._shards = [m.shard for m in masks.values()]
        numbers = {name: number for number, name in enumerate(masks)}
        self._frozen = {numbers[name]: part.to(masks[name].logits.device) for name, part in (frozen or {}).items()}
        self.optimizer = MaskAdamW(
            self._logits,
            lr=s.learning_rate,
            betas=s.betas,
            eps=s.eps,
            weight_decay=s.weight_decay,
            state=s.state,
            seed=s.seed,
            firsts=[_first(shard, p) for shard, p in zip(self._shards, self._logits, strict=True)],
        )
        self._sums: dict[int, Tensor] = {}  # gradients over the micro-batches so far, by the number of the weight
        self._squared_norms: dict[int, Tensor] = {}  # of the gradients of this step
        self._hooks = []
        if s.step_in_backward or (s.state != "float32" and micro_batches > 1):
            for number, parameter in enumerate(self._logits):
                hook = functools.partial(self._on_gradient, number)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def close(self) -> None:
        """Let go of the logits: logits and this object hold each other through hooks, where no garbage collector looks."""
        for hook in self._hooks:
            hook.remove()

    def set_rate(self, rate: float) -> None:
        """The learning rate from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def finish(self) -> Tensor:
        """The optimizer's step, unless the backward pass took it. Returns the norm of the whole gradient before clipping."""
        s = self.settings
        for number, total in self._sums.items():
            self._logits[number].grad = total
        self._sums.clear()
        if not s.step_in_backward:
            for number in self._frozen:
                self._still(number)
        if s.clip_by == "network" and not s.step_in_backward:
            norm = self._clip_network()
            self.optimizer.step()
        else:
            if not s.step_in_backward:
                self._squared_norms = {n: self._move(n) for n, p in enumerate(self._logits) if p.grad is not None}
            norm = torch.stack([self._squared_norms[number] for number in sorted(self._squared_norms)]).sum().sqrt()
            self._squared_norms.clear()
        for parameter in self._logits:
            parameter.grad = None
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Logits and moments as they are kept, by `logits/NAME` and `KEY/NAME`: what `load` continues from.

        Those of shards are gathered on the CPU of the first process, so that what is saved does not tell on how many it was learned; the others
        get nothing. All of them must call it.
        """
        found: dict[str, Tensor] = {}
        for name, mask in self.masks.items():
            kept = {"logits": mask.logits.detach(), **self.optimizer.moments(mask.logits)}
            for key, value in kept.items():
                whole = _whole(mask, key, value)
                if mask.shard is None or mask.shard.rank == 0:
                    found[f"{key}/{name}"] = whole.cpu() if mask.shard else whole
        return found

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue after `step` steps from what `tensors` returned then. Raises MaskError when that was of another `state` or other masks."""
        for name, mask in self.masks.items():
            logits, shape = tensors.get(f"logits/{name}"), (*mask.shape[:-1], *mask.logits.shape[-2:])
            if logits is None or logits.dtype != mask.logits.dtype or logits.shape != shape:
                raise MaskError(
                    f"the checkpoint of step {step} holds no {mask.logits.dtype} logits {shape} for {name}: "
                    "it was saved with another `state` or parametrization"
                )
            keys = [key for key in self.optimizer.moments(mask.logits) if f"{key}/{name}" in tensors]
            moments = {key: _own(mask, key, tensors[f"{key}/{name}"]) for key in keys}
            self.optimizer.load_moments(mask.logits, step, moments)
            with torch.no_grad():
                mask.logits.copy_(_own(mask, "logits", logits))

    def _on_gradient(self, number: int, logits: Tensor) -> None:
        """Called by autograd when the gradient of one weight's logits is complete."""
        assert isinstance(logits, nn.Parameter)
        assert logits.grad is not None
        if self.settings.step_in_backward:
            self._still(number)
            self._squared_norms[number] = self._move(number)
        elif number in self._sums:
            accumulate(self._sums[number], logits.grad, self.settings.seed, self.state.step, self.state.micro_batch, number)
        else:
            self._sums[number] = logits.grad.contiguous()
        logits.grad = None

    def _still(self, number: int) -> None:
        """Take the gradient from the frozen part of a weight's logits."""
        grad, part = self._logits[number].grad, self._frozen.get(number)
        if grad is not None and part is not None:
            grad[part] = 0

    def _clip_network(self) -> Tensor:
        """Clip the whole gradient by its norm, which is returned."""
        limit = self.settings.clip or math.inf
        if not any(self._shards):
            return torch.nn.utils.clip_grad_norm_(self._logits, limit)
        own = torch.nn.utils.get_total_norm([p.grad for p in self._logits if p.grad is not None])
        norm = summed(own.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self._logits, limit, norm)
        return norm

    def _move(self, number: int) -> Tensor:
        """Step one weight's logits, clipped by their own norm. Returns its square."""
        s, logits = self.settings, self._logits[number]
        assert logits.grad is not None
        squared = squared_norm(logits.grad)
        if self._shards[number] is not None:
            squared = summed(squared)
        gain = None
        if s.clip:
            gain = (s.clip * math.sqrt(self._shares[number]) / (squared.sqrt() + 1e-6)).clamp(max=1.0)
        self.optimizer.step_one(logits, gain)
        return squared


def _first(shard: Shard | None, logits: Tensor) -> int:
    """The number of a parameter's first logit among those of the whole weight."""
    return shard.own.start * logits[0].numel() if shard is not None and len(logits) else 0


def _flat(mask: WeightMask, shard: Shard, key: str) -> Shard:
    """The shard in numbers of what is kept as `key`: one a logit, or of scales one for 256 logits."""
    row = math.prod(mask.logits.shape[1:])
    logits_each = BLOCK if key.endswith("_scales") else 1
    return dataclasses.replace(shard, rows=-(-shard.rows * row // logits_each), size=shard.size * row // logits_each)


def _whole(mask: WeightMask, key: str, own: Tensor) -> Tensor:
    """What all processes keep of one weight together."""
    if mask.shard is None:
        return own
    whole = _flat(mask, mask.shard, key).gather(own.reshape(-1))
    return whole.view(*mask.shape[:-1], *own.shape[-2:]) if own.dim() > 1 else whole


def _own(mask: WeightMask, key: str, whole: Tensor) -> Tensor:
    """This process's part of what `_whole` gathered."""
    if mask.shard is None:
        return whole
    own = whole.reshape(-1)[_flat(mask, mask.shard, key).own].clone()
    return own.view(mask.logits.shape) if whole.dim() > 1 else own


def check_settings(s: LearnSettings, micro_batches: int) -> None:
    """Raise MaskError when a step of this many backward passes cannot be taken as the settings say."""
    if s.step_in_backward and micro_batches > 1:
        raise MaskError(
            f"step_in_backward moves the logits in every backward pass, but a step of {s.batch} sequences takes {micro_batches} "
            f"of them; set micro_batch to {s.micro_batch * micro_batches}, or step_in_backward to false (a state other than float32 then sums the "
            "gradient in bfloat16, 2 bytes a logit)"
        )
    if s.step_in_backward and s.clip and s.clip_by == "network":
        raise MaskError(
            "step_in_backward never has the gradient of the whole network, so it cannot clip by its norm; set clip_by to weight, or clip to 0"
        )
