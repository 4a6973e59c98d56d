"""Rounding one matrix so that its outputs change least, not its weights.

With inputs x of second moment `H = sum x x^T` a change D of the weights `[N, K]` costs `tr(D H D^T)`: the squared change of the
outputs over the calibration tokens. Three steps, each of which works on that sum and none of which needs the tokens themselves:

1. `grid.fit` chooses scale and zero of every group, every column weighted by its diagonal entry of H;
2. `gptq` rounds column by column and lets the columns not yet rounded make up for each error (GPTQ, Frantar et al.,
   arXiv 2210.17323), inside a block and between blocks, at every bit width;
3. `refine` goes over the groups again: least-squares scale and zero for the codes as they are, then each code in turn as is
   best given all others (coordinate descent, as QuantEase, Behdin et al., arXiv 2309.01885). It never raises the sum.

`quantize_matrix` is the policy around them: what to do when H is singular, or when calibration saw nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.quantize.grid import Grid, Quantized, check_matrix, fit, make, quantize, ratio
from maskllm.errors import MaskError
from maskllm.hessian import damped, inverse_factor

Order = Literal["given", "activation"]
_BLOCK = 128  # columns rounded before the rest of the matrix hears of their errors: one large product instead of many small
_MIN_DAMPING = 0.01  # as a share of the mean diagonal; GPTQ's own value


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one matrix.

    method: "gptq", or "rtn" (rounding to nearest, without the inputs). damping: the one that worked, None for "rtn". error:
    `output_error` on the calibration inputs, None where there were none. note: why it is not what was asked for, else "".
    """

    quantized: Quantized
    method: Literal["gptq", "rtn"]
    damping: float | None
    error: float | None
    note: str


def weighted_gram(inputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_t c_t x_t x_t^T`: float32 `[K, K]` from inputs `[T, K]` and weights c `[T]`, at least 0 (None: all 1).

    An expert whose output enters the block times the routing weight g of the token has the error `sum_t g_t^2 |D x_t|^2` in the
    block's output, so c = g^2 makes its gram that of the block. MoEQuant (arXiv 2505.03804) takes c = g.
    Raises UsageError for weights of another length or below 0.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    if weights is None:
        return x.T @ x
    c = weights.reshape(-1).float()
    if len(c) != len(x) or bool((c < 0).any()):
        raise UsageError(f"{len(x)} inputs need as many weights of at least 0; got {len(c)}, the least {float(c.min()):.3g}")
    return x.T @ (x * c[:, None])


def output_error(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    """`tr((W - Q) H (W - Q)^T) / tr(W H W^T)`: squared change of the outputs, relative to the outputs, over the tokens in `gram`.

    weight, changed: `[N, K]`. 0 when both are 0, infinity when only the outputs are.
    """
    w, gap = weight.double(), weight.double() - changed.double()
    h = gram.double()
    above, below = float(((gap @ h) * gap).sum()), float(((w @ h) * w).sum())
    return above / below if below > 0 else (0.0 if above <= 0 else float("inf"))


def rtn(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, *, mask: Tensor | None = None, search: bool = True
) -> Quantized:
    """Rounding to nearest: `grid.fit` and `grid.quantize`. mask: as in `gptq`; importance, search: as in `fit`."""
    check_matrix(weight)
    kept = _masked(weight, grid, mask)
    if mask is not None:
        importance = mask.float() if importance is None else importance * mask
    return quantize(kept, grid, *fit(kept, grid, importance, search=search))


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    order: Order = "activation",
    damping: float = 0.01,
    rounds: int = 4,
    mask: Tensor | None = None,
) -> Quantized:
    """Quantise `weight` `[N, K]` against the inputs of `gram` `[K, K]`, whose scale does not matter.

    order: "activation" rounds the columns of large inputs first, when all others can still make up for them; "given" goes from left
    to right. Neither is stored: groups are those of the matrix as it is. damping: added to the diagonal, as a share of its mean.
    rounds: of `refine`; 0 is GPTQ alone. mask: bool `[N, K]`, True = kept. Pruned weights come out as exactly 0 and what they
    contributed is compensated like any other error; the grid must have a level at 0.

    Raises CompressError for a weight or gram that is not finite, UsageError for shapes that do not fit and a mask on a grid
    without zero, MaskError when the damped gram is not positive definite.
    """
    if order not in ("given", "activation"):
        raise UsageError(f"the order {order!r} is not known; 'given' or 'activation'")
    check_matrix(weight)
    check_matrix(gram, "the gram of the inputs")
    columns = weight.shape[1]
    if gram.shape != (columns, columns):
        raise UsageError(f"a weight of {columns} inputs needs a gram of that size; got {list(gram.shape)}")
    kept = _masked(weight, grid, mask)
    h, _ = damped(gram, damping)
    diagonal = h.diagonal()
    visit = torch.arange(columns, device=h.device)
    if order == "activation":
        visit = torch.argsort(diagonal, descending=True, stable=True)
    upper = inverse_factor(h[visit][:, visit])
    scale, zero = fit(kept, grid, diagonal if mask is None else diagonal * mask)
    codes = _compensated(weight.float(), upper, grid, scale, zero, mask, visit.tolist())
    return refine(weight, h, make(grid, codes, scale, zero), rounds=rounds, mask=mask)


def _compensated(
    weight: Tensor, upper: Tensor, grid: Grid, scale: Tensor, zero: Tensor, mask: Tensor | None, visit: list[int]
) -> Tensor:
    """GPTQ's pass: codes, float32 `[N, K]`. upper: `[K, K]`, the factor of the inverse Hessian with its columns in the order `visit`."""
    work = weight.T[visit].contiguous()  # [K, N]: a column of the weight is a row here, contiguous in memory
    scale, zero = scale.T.contiguous(), zero.T.contiguous()  # [G, N]
    codes = torch.empty_like(work)
    for start in range(0, len(work), _BLOCK):
        end = min(start + _BLOCK, len(work))
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            column = visit[j]
            group = column // grid.group_size
            code = _code(grid, work[j], scale[group], zero[group], None if mask is None else mask[:, column])
            error = (work[j] - (code - zero[group]) * scale[group]) / upper[j, j]
            work[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
            errors[j - start], codes[column] = error, code
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes.T


@torch.no_grad()
def refine(weight: Tensor, hessian: Tensor, start: Quantized, *, rounds: int = 4, mask: Tensor | None = None) -> Quantized:
    """Lower `tr((W - Q) H (W - Q)^T)` from `start` by block coordinate descent, a group of columns at a time.

    hessian: positive diagonal, `[K, K]` (a damped gram). A round visits every group once. In it, row by row: scale and zero
    become the least-squares solution for the codes, rounded as they are stored, where that lowers the sum; then every code in
    turn becomes the best one given all others. mask: as in `gptq`; `start` must hold 0 at pruned weights.
    """
    grid, size, columns = start.grid, start.grid.group_size, weight.shape[1]
    target, h = weight.float().T.contiguous(), hessian.float()  # [K, N]
    codes = start.codes.float().T.contiguous()
    scale, zero = (part.T.contiguous() for part in start.parameters())  # [G, N]
    value = start.dequantize().T.contiguous()
    kept = None if mask is None else mask.T
    for _ in range(rounds):
        # [K, N]: minus half the gradient. Anew each round, so that the rounding of the updates below does not build up.
        pull = h @ (target - value)
        for group in range(grid.groups(columns)):
            cut = slice(group * size, min((group + 1) * size, columns))
            before = value[cut].clone()
            parts = grid, h[cut, cut], pull[cut], codes[cut], scale[group], zero[group], value[cut]
            _refit(*parts)
            _recode(*parts, None if kept is None else kept[cut])
            change = value[cut] - before
            pull[: cut.start].addmm_(h[: cut.start, cut], change, alpha=-1)
            pull[cut.stop :].addmm_(h[cut.stop :, cut], change, alpha=-1)
    return make(grid, codes.T, scale.T, zero.T)


def _refit(grid: Grid, h: Tensor, pull: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, value: Tensor) -> None:
    """Least-squares scale (and float zero) of one group, in place. h: `[g, g]`; pull, codes, value: `[g, N]`; scale, zero: `[N]`.

    The group's values are linear in (s, m = -s z): `q = s c + m`. With all else fixed the sum is, up to a constant,
    `q^T H q - 2 q^T (pull + H q_now)`.
    """
    wanted = pull + h @ value
    level = codes if grid.kind == "float" else codes - zero
    h_level = h @ level
    ss, sy = (level * h_level).sum(0), (level * wanted).sum(0)
    if grid.kind == "float":
        sm, mm, my = h_level.sum(0), h.sum(), wanted.sum(0)
        determinant = ss * mm - sm.square()
        new = ratio(sy * mm - sm * my, determinant, scale)
        offset = ratio(ss * my - sm * sy, determinant, -scale * zero)
        new, new_zero = grid.stored(new, ratio(-offset, new, zero))
    else:
        new, new_zero = grid.stored(ratio(sy, ss, scale), zero)
    candidate = (codes - new_zero) * new
    change = candidate - value
    gain = (change * (2 * pull - h @ change)).sum(0)  # by how much the sum falls
    better = (gain > 0) & new.isfinite() & new_zero.isfinite()
    scale.copy_(torch.where(better, new, scale))
    zero.copy_(torch.where(better, new_zero, zero))
    pull.sub_(h @ torch.where(better, change, 0.0))
    value.copy_(torch.where(better, candidate, value))


def _recode(
    grid: Grid, h: Tensor, pull: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, value: Tensor, kept: Tensor | None
) -> None:
    """Every code of one group in turn as is best given all other weights of its row, in place. Shapes as in `_refit`."""
    for j in range(len(value)):
        best = value[j] + pull[j] / h[j, j]
        code = _code(grid, best, scale, zero, None if kept is None else kept[j])
        new = (code - zero) * scale
        pull.addr_(h[:, j], new - value[j], alpha=-1)
        codes[j], value[j] = code, new


def _code(grid: Grid, values: Tensor, scale: Tensor, zero: Tensor, kept: Tensor | None) -> Tensor:
    code = grid.nearest(values, scale, zero)
    return code if kept is None else torch.where(kept, code, zero)


def _masked(weight: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
    if mask is None:
        return weight.float()
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise UsageError(
            f"the mask is {mask.dtype} {list(mask.shape)}; the weight {list(weight.shape)} needs a bool mask of its shape"
        )
    if not grid.has_zero:
        raise UsageError(
            f"a {grid.kind} grid has no level at zero, so it cannot hold pruned weights; use symmetric or asymmetric"
        )
    return weight.float() * mask


def quantize_matrix(
    weight: Tensor,
    gram: Tensor | None,
    grid: Grid,
    *,
    tokens: int | None = None,
    order: Order = "activation",
    rounds: int = 4,
    mask: Tensor | None = None,
) -> Outcome:
    """Quantise one matrix by GPTQ, or by rounding to nearest with the clip search where calibration gives nothing to go by.

    tokens: how many inputs the gram was summed over. The fewer, the more of what it says is chance and the stronger the damping:
    `columns / (2 tokens)`, at least 0.01 (and 0.01 when `tokens` is None). As the tokens vanish this becomes rounding to
    nearest; docs/quantize.md has what it gains before that. Where the damped gram cannot be factorised the damping is
    tripled, up to four times. Rounding to nearest is left for matrices without inputs (`gram` None or all zero) and for grams
    that no damping helps. Raises what `gptq` raises for unsound arguments.
    """
    if gram is None or tokens == 0 or not bool((gram != 0).any()):
        plain = rtn(weight, grid, mask=mask)
        return Outcome(plain, "rtn", None, None, "no calibration token reached it: rounded to nearest")
    columns = weight.shape[1]
    first = _MIN_DAMPING if tokens is None else max(columns / (2 * tokens), _MIN_DAMPING)
    notes = [f"{tokens} tokens for {columns} inputs"] if tokens is not None and tokens < columns else []
    for damping in (first * 3**i for i in range(5)):
        try:
            found = gptq(weight, gram, grid, order=order, damping=damping, rounds=rounds, mask=mask)
        except MaskError:
            continue
        if damping != first:
            notes.append(f"the gram of its inputs is nearly singular: damping raised to {damping:.2g}")
        return Outcome(found, "gptq", damping, output_error(weight, found.dequantize(), gram), "; ".join(notes))
    plain = rtn(weight, grid, mask=mask)
    notes.append("the gram of its inputs is not positive definite with any damping: rounded to nearest")
    return Outcome(plain, "rtn", None, output_error(weight, plain.dequantize(), gram), "; ".join(notes))
