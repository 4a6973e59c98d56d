"""Logits, and if wanted the frozen weights, shared out over processes: each keeps rows of every weight, and makes the masks of those rows for all.

Where every process holds all logits (data parallel), each also holds all gradients and moments, 16 bytes a weight in float32. Sharded, a
process holds a share of them, as ZeRO does (Rajbhandari et al., arXiv 1910.02054). What travels are masked weights and their
gradients in the type of the products, not logits, which are larger:

    forward   the owner of some rows masks them for every process, with that process's noise, and sends each its rows (all-to-all);
              without noise one mask serves all (all-gather)
    backward  every process sends the gradient of the masked rows to their owner (all-to-all), who goes back through each one's mask
              and averages the gradients of the logits in float32

so the average is that of data parallel learning, in the same order of addition. The owner of rows alone masks them, so with `weights` it is
also the only one that keeps them; who computes with the dense or the final network gathers its weights as they are read, as stage 3 of
ZeRO does. What is not masked (embeddings, norms, an output head) stays whole in every process.

A process must read the masked weights of a network in the same order as all others, as dense networks and fused experts do; experts
that are modules of their own, called where a token reaches them, do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from compress_kernels.gumbel import Draw, masked_weight, masked_weight_backward
from maskllm.optim import BLOCK

# What processes share out: nothing; logits with their gradients and moments; the frozen weights under the masks as well.
Sharding = Literal["none", "logits", "weights"]

_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the first is the second's new name


@dataclass(frozen=True)
class Shard:
    """The rows of one weight, `[rows, K]` with all leading dimensions flattened, that one of several processes keeps.

    Process r keeps rows `r * size` to `(r + 1) * size`, the last ones fewer or none. `size` is such that every share begins at a multiple of 256
    logits: 8-bit moments (`maskllm.optim`) are then the same, block for block, as those of whole logits.
    """

    rows: int
    size: int
    rank: int
    processes: int

    @classmethod
    def of(cls, rows: int, row_logits: int, rank: int, processes: int) -> Shard:
        """The share of process `rank` in a weight with so many rows, of so many logits each."""
        unit = BLOCK // math.gcd(BLOCK, row_logits)
        return cls(rows, unit * -(-rows // (unit * processes)), rank, processes)

    @property
    def own(self) -> slice:
        """The rows of this process."""
        return slice(min(self.rank * self.size, self.rows), min((self.rank + 1) * self.size, self.rows))

    def gather(self, part: Tensor) -> Tensor:
        """All rows, from each process's own: `[own, ...]` to `[rows, ...]`. Every process must call it."""
        if len(part) < self.size:
            part = torch.cat([part, part.new_zeros(self.size - len(part), *part.shape[1:])])
        whole = part.new_empty(self.processes * self.size, *part.shape[1:])
        all_gather(whole, part)
        return whole[: self.rows]


def all_gather(whole: Tensor, part: Tensor) -> None:
    """Let `whole` be the parts of all processes, one after the other along the first dimension."""
    _gather(whole, part.contiguous())


def all_to_all(received: Tensor, sent: Tensor) -> None:
    """Cut `sent` into a piece for every process along the first dimension; `received` is what they cut for this one, in order."""
    dist.all_to_all_single(received, sent)


def summed(value: Tensor) -> Tensor:
    """The sum of a number over all processes, in each."""
    value = value.clone()
    dist.all_reduce(value)
    return value


class ShardedSoftMask(torch.autograd.Function):
    """(own logits `[own, K/M, W]`, own rows `[own, K]` of the weight) -> (whole masked weight `[rows, K]`, its squared norm).

    The gradient of the logits is the processes' average.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        own: Tensor,
        table: Tensor,
        n: int,
        scores: bool,
        draws: list[Draw],
        shard: Shard,
        out_dtype: torch.dtype,
        want_norm: bool,
    ) -> tuple[Tensor, Tensor]:
        """draws: of every process. One that all share gives the same mask to all."""
        ctx.save_for_backward(logits, own, table)
        ctx.n, ctx.scores, ctx.draws, ctx.shard, ctx.want_norm = n, scores, draws, shard, want_norm
        ctx.set_materialize_grads(False)
        shared = all(draw == draws[0] for draw in draws)
        rows, columns = own.shape
        made = own.new_zeros(1 if shared else shard.processes, shard.size, columns, dtype=out_dtype)
        norms = torch.zeros(shard.processes, device=own.device)
        for r in range(len(made)):
            out, norm = masked_weight(
                _groups(logits),
                own.reshape(-1, table.shape[1]),
                table,
                scores,
                draws[r],
                out_dtype,
                want_norm,
                n=n,
                first_group=_first(logits, shard),
            )
            made[r, :rows] = out.view(rows, columns)
            norms[r] = norm
        whole = own.new_empty(shard.processes * shard.size, columns, dtype=out_dtype)
        if shared:
            all_gather(whole, made[0])
            norms[:] = norms[0].clone()
        else:
            all_to_all(whole, made.flatten(0, 1))
        norm = torch.zeros((), device=own.device)
        if want_norm:
            received = torch.empty_like(norms)
            all_to_all(received, norms)
            norm = received.sum()
        return whole[: shard.rows], norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, own, table = ctx.saved_tensors
        shard, rows = ctx.shard, len(own)
        grad, grad_norm = grads[0], grads[1]
        # Every process takes part, also one whose masked weight had no gradient.
        like = grad if grad is not None else own
        sent = like.new_zeros(shard.processes * shard.size, own.shape[1])
        if grad is not None:
            sent[: shard.rows] = grad
        received = torch.empty_like(sent)
        all_to_all(received, sent)
        grad_norms: Tensor | None = None
        if ctx.want_norm:
            grad_norms = torch.empty(shard.processes, device=own.device)
            all_gather(grad_norms, grad_norm.reshape(1).float() if grad_norm is not None else grad_norms.new_zeros(1))
        average = torch.zeros(_groups(logits).shape, device=own.device, dtype=torch.promote_types(logits.dtype, torch.float32))
        for r, part in enumerate(received.view(shard.processes, shard.size, -1)):
            masked_weight_backward(
                part[:rows].reshape(-1, table.shape[1]),
                grad_norms[r] if grad_norms is not None else None,
                _groups(logits),
                own.reshape(-1, table.shape[1]),
                table,
                ctx.scores,
                ctx.draws[r],
                n=ctx.n,
                accumulate=average,
                first_group=_first(logits, shard),
            )
        average /= shard.processes
        return (average.view(logits.shape).to(logits.dtype), *[None] * 8)


def _groups(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _first(logits: Tensor, shard: Shard) -> int:
    """The number of the first own group in the noise of the whole weight."""
    return shard.own.start * logits.shape[1]
