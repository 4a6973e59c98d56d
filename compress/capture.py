"""What flows into every weight matrix: the statistics that one-shot pruning and quantisation work from.

`InputCapture` watches products, not modules, so it sees fused experts, transposed layers and bare parameters alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError
from compress.weights import WeightRef


@dataclass
class InputStats:
    """Sums over the `tokens` inputs x `[in]` of one matrix, in float32.

    `sum_squares` `[in]` is the sum of x*x by channel, `gram` `[in, in]` the sum of x x^T (None when it was not asked for).
    A matrix that no token reached, as an expert that was never chosen, has 0 tokens and zeros.
    """

    tokens: int
    sum_squares: Tensor
    gram: Tensor | None

    def add(self, other: InputStats) -> None:
        """Add the sums of other inputs of the same matrix, in place."""
        self.tokens += other.tokens
        self.sum_squares += other.sum_squares
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram


# Position of the two factors of a product among the arguments, and their keyword names.
_PRODUCTS: dict[Any, tuple[int, tuple[str, str]]] = {
    functional.linear: (0, ("input", "weight")),
    torch.matmul: (0, ("input", "other")),
    torch.mm: (0, ("input", "mat2")),
    torch.bmm: (0, ("input", "mat2")),
    torch.addmm: (1, ("mat1", "mat2")),
    torch.baddbmm: (1, ("batch1", "batch2")),
    torch.Tensor.matmul: (0, ("self", "other")),
    torch.Tensor.__matmul__: (0, ("self", "other")),
    torch.Tensor.__rmatmul__: (0, ("self", "other")),
    torch.Tensor.mm: (0, ("self", "mat2")),
    torch.Tensor.bmm: (0, ("self", "mat2")),
    torch.Tensor.addmm: (1, ("mat1", "mat2")),
    torch.Tensor.baddbmm: (1, ("batch1", "batch2")),
}


class InputCapture(TorchFunctionMode):
    """Sums up the inputs of the matrices in `refs` while it is entered.

    It sees linear, matmul, `@`, mm, addmm, bmm and baddbmm and recognises the weight by its place in memory: a parameter, one
    expert's slice of it, or a stack of slices, transposed or not. Matrices that share a product (gate and up of a fused
    expert) share one `InputStats`. Rows of zeros in a product of stacks are not counted: Llama-4 gives all tokens to every
    expert and zeroes those not routed to it.

    Fused experts have to run in the eager implementation (`eager_experts`): the others copy or hand over whole parameters.

    Raises CompressError, inside the model's forward, for inputs that are not finite.
    """

    def __init__(self, refs: Sequence[WeightRef], gram: bool = True) -> None:
        super().__init__()
        self._refs = list(refs)
        self._gram = gram
        self._watched: dict[tuple[Any, ...], list[WeightRef]] = {}
        self._slices: dict[tuple[Any, ...], str] = {}  # every slice of a parameter that is watched in part -> the parameter
        self._stats: dict[str, InputStats] = {}
        self._seen: set[str] = set()
        self._last: tuple[Tensor, int, InputStats] | None = None
        fused: set[str] = set()
        for ref in refs:
            self._watched.setdefault(_place(ref.whole()), []).append(ref)
            if ref.parameter.dim() == 2:
                self._slices[_place(ref.whole())] = ref.full_name
            elif ref.full_name not in fused:
                fused.add(ref.full_name)
                whole = ref.parameter.detach()
                for matrix in whole if ref.contracted_dim == -1 else whole.mT:
                    self._slices[_place(matrix)] = ref.full_name

    def stats(self) -> dict[str, InputStats]:
        """The sums so far, by the `name` of the matrix, in the order of `refs`."""
        result = {}
        for refs in self._watched.values():
            shared = self._stats.get(refs[0].name) or self._zeros(refs[0])
            result.update({ref.name: shared for ref in refs})
        return {ref.name: result[ref.name] for ref in self._refs}

    def unseen(self) -> list[str]:
        """Parameters that took part in no product at all. (An expert of its own module may rightly go without tokens.)"""
        names = (ref.full_name for ref in self._refs if ref.expert is None or ref.parameter.dim() == 3)
        return [name for name in dict.fromkeys(names) if name not in self._seen]

    def __exit__(self, *error: Any) -> None:
        self._last = None
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            first, names = _PRODUCTS[func]
            left, right = (args[first + i] if first + i < len(args) else kwargs.get(name) for i, name in enumerate(names))
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                if func is torch.Tensor.__rmatmul__:
                    left, right = right, left
                for inputs, matrix, stacked in _factors(left, right, func is functional.linear):
                    self._observe(inputs, matrix, stacked)
        return func(*args, **kwargs)

    def _observe(self, inputs: Tensor, matrix: Tensor, stacked: bool) -> None:
        place = _place(matrix)
        if place not in self._slices:
            return
        self._seen.add(self._slices[place])
        if place in self._watched:
            self._record(self._watched[place], inputs, stacked)

    @torch.no_grad()
    def _record(self, refs: list[WeightRef], inputs: Tensor, stacked: bool) -> None:
        """Add the inputs `[..., in]` of one product to the sums of `refs`, which share it."""
        # Queries, keys and values (gate and up) get the very same tensor one after the other: its gram is computed once.
        version = -1 if inputs.is_inference() else inputs._version
        if self._last is not None and self._last[0] is inputs and self._last[1] == version != -1:
            part = self._last[2]
        else:
            part = self._sums(refs[0], inputs, stacked)
            self._last = (inputs, version, part)
        self._stats.setdefault(refs[0].name, self._zeros(refs[0])).add(part)

    def _sums(self, ref: WeightRef, inputs: Tensor, stacked: bool) -> InputStats:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        if stacked:
            x = x[(x != 0).any(-1)]
        sum_squares = x.square().sum(0)
        if not bool(torch.isfinite(sum_squares).all()):
            raise CompressError(
                f"the calibration inputs of {ref.name} are not finite: the model overflows in {inputs.dtype}; "
                "load it in bfloat16 or float32, and check that it predicts text at all"
            )
        return InputStats(x.shape[0], sum_squares, x.T @ x if self._gram else None)

    def _zeros(self, ref: WeightRef) -> InputStats:
        size, device = ref.shape[1], ref.parameter.device
        return InputStats(0, torch.zeros(size, device=device), torch.zeros(size, size, device=device) if self._gram else None)


def _place(matrix: Tensor) -> tuple[Any, ...]:
    """Identity of a matrix `[out, in]` in memory: where it starts and how it is laid out."""
    strides = tuple(0 if size == 1 else stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix.data_ptr(), matrix.device, matrix.dtype, tuple(matrix.shape), strides


def _factors(left: Tensor, right: Tensor, linear: bool) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """How a product may be read as inputs `[..., in]` times a weight `[out, in]`: `(inputs, weight, from a stack)`.

    The weight may stand on either side: `x @ W.T`, or `W @ x` with the inputs in columns.
    """
    if linear:
        yield left, right, False
        return
    if right.dim() == 2:
        yield left, right.mT, False
    elif right.dim() == 3:
        for i, matrix in enumerate(right):
            if (inputs := _item(left, i, len(right))) is not None:
                yield inputs, matrix.mT, True
    if left.dim() == 2:
        yield (right if right.dim() == 1 else right.mT), left, False
    elif left.dim() == 3:
        for i, matrix in enumerate(left):
            if (inputs := _item(right, i, len(left))) is not None:
                yield (inputs if inputs.dim() == 1 else inputs.mT), matrix, True


def _item(factor: Tensor, index: int, count: int) -> Tensor | None:
    """The part of the other factor of a stacked product that meets matrix `index`, by the rules of broadcasting."""
    if factor.dim() <= 2:
        return factor
    if factor.dim() == 3 and len(factor) in (1, count):
        return factor[index % len(factor)]
    return None
