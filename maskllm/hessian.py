"""The Hessian of a layer's output error, and the factor of its inverse that SparseGPT and GPTQ walk down.

For one matrix the output error over the calibration tokens is `tr(D H D^T)`, D the change of the weights and `H = sum x x^T`
(the gram of the inputs, `[in, in]`), so H is half its second derivative, the same for every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskllm.errors import MaskError


def damped(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """`gram` with `damping` times its mean diagonal added to the diagonal: float32 `[in, in]`, and which inputs were never on.

    Those inputs (bool `[in]`) get the mean as their diagonal first, so that the scale of the gram does not matter.
    """
    h = gram.float().clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal.mean() if not bool(dead.all()) else 1.0
    diagonal.add_(damping * diagonal.mean())
    return h, dead


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse, `H^-1 = U^T U`: float32 `[in, in]`.

    Row j of U over its diagonal is how an error at column j spreads best over the columns right of it. Raises MaskError when H
    is not positive definite to the precision of float32.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian)
    upper, failed_inverse = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(failed) or int(failed_inverse) or not bool(upper.isfinite().all()):
        raise MaskError(
            "the second moment of the inputs is not positive definite with this damping: raise the damping (0.1) or calibrate on more text"
        )
    return upper
