"""Soft N:M masks in torch: the definition of the operation, and fast enough on a CPU to train with.

For a group of M weights with candidate masks S_k (k = 1..C, the rows of the table S) and candidate logits pi_k

    z = (kappa * pi + g) / tau      g ~ Gumbel(0, 1), or 0 without noise
    y = softmax(z)                  m = y S                  w' = m * w

(MaskLLM, arXiv 2409.17481, eq. 4-7; the paper's `log p` differs from `kappa * pi` by a constant that the softmax removes.)
Two parametrisations share this code. `patterns`: pi is stored, C numbers a group. `scores`: M numbers s a group are stored and
pi = S s, so that a pattern's logit is the sum of the scores of the weights it keeps.

The gradient is closed form. With G = dL/dm = dL/dw' * w:

    dL/dy = S G,   dL/dz = y * (dL/dy - <y, dL/dy>),   dL/dpi = kappa / tau * dL/dz,   dL/ds = S^T dL/dpi.

Nothing but the logits is kept for the backward pass: y is computed again, and the noise is drawn again from its counter.

Groups are walked in chunks that stay in the second-level cache, with the candidates along the first dimension, so that every
step is one vectorised sweep; written as single tensor expressions over the whole weight the same arithmetic is bound by memory
and takes an order of magnitude longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 20  # numbers a chunk holds per temporary: 4 MiB of float32, measured best among 2^16..2^23 on a 2 MiB-L2 core
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """How one mask is drawn.

    tau: temperature, > 0. kappa: scale of the logits. noise_key: key of the Gumbel stream (`stream_key`), None for no noise.
    hard: the forward pass uses the most probable candidate, the backward pass the soft gradient (straight-through).
    """

    tau: float
    kappa: float
    noise_key: int | None = None
    hard: bool = False


def stream_key(*parts: int) -> int:
    """A 64-bit key that depends on every part and on their order (splitmix64): for (seed, step, micro-batch, layer)."""
    key = 0
    for part in parts:
        x = (key ^ (part & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
        key = x ^ x >> 31
    return key


def _signed(value: int) -> int:
    """The int32 with the same 32 bits."""
    value &= _MASK32
    return value - (1 << 32) if value >> 31 else value


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (two multiplications, three xor-shifts) on int32, in place; >> is arithmetic, hence the masks."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def random_bits(key: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements `first .. first+count-1` of the stream `key` of 32 random bits each: int32 `[count]`.

    Counter-based: an element depends on its number and the key only, not on what was drawn before, so a stream may be drawn in
    any order, in pieces, again in the backward pass, and on any number of threads and processes.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int32, device=device)
    high = first >> 32
    if high != (first + count - 1) >> 32:
        split = ((high + 1) << 32) - first
        return torch.cat([random_bits(key, first, split, device), random_bits(key, first + split, count - split, device)])
    k0, k1 = stream_key(key, high) & _MASK32, stream_key(key, high) >> 32
    low = first & _MASK32
    counter = torch.arange(low, low + count, dtype=torch.int64, device=device).to(torch.int32)
    counter ^= _signed(k0)
    x = _mix(counter)
    x += _signed(k1)
    return _mix(x)


def gumbel_noise(key: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements `first .. first+count-1` of the Gumbel(0, 1) stream `key`: float32 `[count]`, from 23 of the `random_bits` each."""
    x = random_bits(key, first, count, device)
    x = (x >> 9) & 0x7FFFFF
    uniform = (x.float() + 0.5) * 2.0**-23  # in (0, 1), both ends excluded
    return uniform.log_().neg_().log_().neg_()


def _chunks(groups: int, width: int) -> Iterator[tuple[int, int]]:
    size = max(1, CHUNK_LOGITS // width)
    for start in range(0, groups, size):
        yield start, min(groups, start + size)


def _probabilities(logits: Tensor, table: Tensor, scores: bool, draw: Draw, first_group: int) -> Tensor:
    """y of some groups: logits `[g, M or C]` -> `[C, g]`, in the logits' dtype, at least float32."""
    pi = logits.to(torch.promote_types(logits.dtype, torch.float32)).t()
    z = torch.mm(table, pi) if scores else pi.contiguous()  # [C, g]
    z = z.mul_(draw.kappa) if scores else z * draw.kappa
    if draw.noise_key is not None:
        candidates, count = table.shape[0], z.shape[1]
        noise = gumbel_noise(draw.noise_key, first_group * candidates, count * candidates, z.device)
        z += noise.view(count, candidates).t()
    return torch.softmax(z.div_(draw.tau), dim=0)


def _mask(y: Tensor, table: Tensor, hard: bool) -> Tensor:
    """Candidate probabilities `[C, g]` -> mask `[g, M]`."""
    if hard:
        return table[y.argmax(0)]
    return torch.mm(y.t(), table)


def masked_weight(
    logits: Tensor,
    weight: Tensor,
    table: Tensor,
    scores: bool,
    draw: Draw,
    out_dtype: torch.dtype,
    want_norm: bool,
    *,
    first_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """The masked weight and its squared norm.

    logits: `[G, C]` for patterns, `[G, M]` for scores, float32 or float64. weight: `[G, M]`, any floating dtype. table: `[C, M]` of 0 and 1.
    first_group: the number of the first group in the noise stream, for a weight that is part of a larger one.
    Returns w' `[G, M]` in `out_dtype` and `sum(w'^2)` as a scalar (0 unless `want_norm`: it costs a pass).
    """
    table = table.to(torch.promote_types(logits.dtype, torch.float32))
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    norm = torch.zeros((), dtype=table.dtype, device=weight.device)
    for a, b in _chunks(weight.shape[0], table.shape[0]):
        mask = _mask(_probabilities(logits[a:b], table, scores, draw, first_group + a), table, draw.hard)
        mask *= weight[a:b]
        if want_norm:
            norm += torch.linalg.vector_norm(mask).square()
        out[a:b] = mask
    return out, norm


def masked_weight_backward(
    grad: Tensor | None,
    grad_norm: Tensor | None,
    logits: Tensor,
    weight: Tensor,
    table: Tensor,
    scores: bool,
    draw: Draw,
    *,
    first_group: int = 0,
) -> Tensor:
    """dL/dlogits, of the logits' shape and dtype, from dL/dw' `[G, M]` and dL/d(sum w'^2), either of which may be None."""
    table = table.to(torch.promote_types(logits.dtype, torch.float32))
    out = torch.empty_like(logits)
    gain = draw.kappa / draw.tau
    for a, b in _chunks(weight.shape[0], table.shape[0]):
        y = _probabilities(logits[a:b], table, scores, draw, first_group + a)
        w = weight[a:b].to(table.dtype)
        upstream = torch.zeros_like(w) if grad is None else grad[a:b].to(table.dtype)
        if grad_norm is not None:
            upstream = upstream + (2 * grad_norm) * (_mask(y, table, draw.hard) * w)
        dy = torch.mm(table, (upstream * w).t())  # [C, g]
        dy -= (y * dy).sum(0)
        dz = dy.mul_(y).mul_(gain)
        out[a:b] = torch.mm(dz.t(), table) if scores else dz.t()
    return out


def probabilities(logits: Tensor, table: Tensor, scores: bool, draw: Draw) -> Tensor:
    """y of every group, `[G, C]`, float32 or float64: for reports and tests; training never holds it whole."""
    table = table.to(torch.promote_types(logits.dtype, torch.float32))
    return _probabilities(logits, table, scores, draw, 0).t()
