"""The quantiser of the released Mixture-Compressor code, as a baseline to compare with. Nothing else uses it.

It differs from `compress.quantize.gptq` where it was found to lose most (the paper is arXiv 2410.06270; the code, of 2025-02-12,
is what its tables were made with):

- the clip search tries 1 +- 0.1 of the range only, by the 2.4th power of the weights' error, blind to the inputs;
- below four bits an error is made up for by later blocks of 128 columns, never inside its own block;
- one bit is the sign and the mean magnitude of the group as it stands when the group is reached;
- columns go from left to right, and nothing is refined afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantize.grid import Grid, Quantized, check_matrix, make, ranges
from maskllm.hessian import damped, inverse_factor

_SHARES = (1.0, *(1 + 0.002 * i for i in range(1, 51)), *(1 - 0.002 * i for i in range(1, 51)))
_POWER = 2.4
_BLOCK = 128


@torch.no_grad()
def published(weight: Tensor, gram: Tensor, bits: int, group_size: int = 128, damping: float = 0.01) -> Quantized:
    """Quantise `weight` `[N, K]` against `gram` `[K, K]` by the published recipe, on the grid it uses: float zeros, one bit without.

    The objective of its clip search is the intended one, that of its packing path; in the path without packing the released
    code dequantises twice. Raises as `compress.quantize.gptq.gptq`.
    """
    check_matrix(weight)
    check_matrix(gram, "the gram of the inputs")
    grid = Grid(bits, group_size, "midrise" if bits == 1 else "float")
    upper = inverse_factor(damped(gram, damping)[0])
    w = weight.float().clone()
    columns = w.shape[1]
    codes = torch.empty_like(w)
    scales, zeros = [], []
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        part, u = w[:, start:end].clone(), upper[start:end, start:end]
        errors = torch.zeros_like(part)
        for j in range(start, end):
            if j % group_size == 0:
                scale, zero = _parameters(grid, w[:, j : j + group_size])
                scales.append(scale)
                zeros.append(zero)
            column = part[:, j - start, None]
            codes[:, j, None] = grid.nearest(column, scale, zero)
            error = (column - (codes[:, j, None] - zero) * scale) / u[j - start, j - start]
            if bits > 3:
                part[:, j - start :] -= error * u[j - start, j - start :]
            errors[:, j - start, None] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return make(grid, codes, torch.cat(scales, 1), torch.cat(zeros, 1))


def _parameters(grid: Grid, group: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero, `[N, 1]` each, of one group `[N, g]`."""
    if grid.bits == 1:
        mean = group.abs().mean(1, keepdim=True)
        return grid.stored(2 * mean, torch.full_like(mean, 0.5))
    least = torch.full((len(group), 1), torch.inf, device=group.device)
    scale, zero = torch.zeros_like(least), torch.zeros_like(least)
    for s, z in ranges(grid, group[:, None], _SHARES):
        s, z = grid.stored(s[:, 0], z[:, 0])
        error = ((grid.nearest(group, s, z) - z) * s - group).abs().pow(_POWER).sum(1, keepdim=True)
        scale, zero = torch.where(error < least, s, scale), torch.where(error < least, z, zero)
        least = torch.minimum(error, least)
    return scale, zero
