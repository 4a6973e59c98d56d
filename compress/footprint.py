"""How much memory a computation takes, found by running it on tensors that have shapes and no data.

The planned code itself runs, in torch's fake-tensor mode, while `LiveBytes` watches every storage come and go; so activations,
masked weights, recomputation, gradients and the loss are counted as they will be, for any architecture. Kernels written in C++ cannot run
on tensors without data; `shapes_only` puts in their place what they allocate.

What is not counted: scratch memory inside torch's own kernels, and what an allocator keeps beyond what is asked of it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import maskllm.gumbel
import maskllm.head
import maskllm.parametrization
import maskllm.sharding
import maskllm.update
from compress_kernels.native import native
from maskllm.optim import MaskAdamW, code_table
from maskllm.patterns import Pattern

_LOSS_CHUNK = 1 << 22  # logits that the loss in torch turns to float32 at once; it holds four arrays of them


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live while it is entered, under labels, and keeps the largest sum.

    peak, at_peak: the largest sum, and what it was made of by label. What is not labelled is "activations".
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._known: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._total = 0

    def add(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count these tensors' storages under `label`, also those that were counted under another."""
        for tensor in tensors:
            self._count(tensor, label)

    def restart(self) -> None:
        """Forget the peak; what lives now stays."""
        self.peak, self.at_peak = self._total, dict(self.live)

    def _count(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            if label != "activations" and known[1] != label:
                self.live[known[1]] -= size
                self.live[label] += size
                self._known[key] = (known[0], label)
            return
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key, size)), label)
        self.live[label] += size
        self._total += size
        if self._total > self.peak:
            self.restart()

    def _forget(self, key: int, size: int) -> None:
        _, label = self._known.pop(key)
        self.live[label] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        # Torch states the shapes of this operation for bfloat16 alone, though it computes it for all types.
        run = _grouped_mm_shape if func is torch.ops.aten._grouped_mm.default else func
        out = run(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor, "activations")
        return out


def _grouped_mm_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if a.dim() == 2 and b.dim() == 2:  # the sum over tokens is cut into groups
        assert offs is not None
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    if a.dim() == 3 and b.dim() == 3:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return a.new_empty(a.shape[-2], b.shape[-1])


@contextmanager
def without_data(live: LiveBytes, device: torch.device) -> Iterator[None]:
    """Within it tensors have no data, and `live` counts what they would take."""
    for signed in (True, False):
        code_table(signed, str(device))  # made here, or its cache would keep a table without data
    noise = logging.getLogger("torch._subclasses.fake_tensor")
    level = noise.level
    noise.setLevel(logging.CRITICAL)  # it logs what it also raises
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), shapes_only(live), live:
            yield
    finally:
        noise.setLevel(level)


def empty_data(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Give `model` parameters and buffers of the same shapes without data (within `without_data`), floating ones as `dtype`; ties stay."""
    made: dict[int, Tensor] = {}

    def replaced(tensor: Tensor, parameter: bool) -> Tensor:
        if id(tensor) not in made:
            kind = dtype if parameter and dtype is not None and tensor.is_floating_point() else tensor.dtype
            new = torch.empty(tensor.shape, dtype=kind, device=device)
            made[id(tensor)] = nn.Parameter(new, requires_grad=False) if parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replaced(parameter, True)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = replaced(buffer, False)


@contextmanager
def shapes_only(live: LiveBytes) -> Iterator[None]:
    """Put functions that only allocate in the place of kernels that need data, and of loops whose temporaries stay in cache."""

    def masked_weight(logits: Tensor, weight: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        out_dtype = next(value for value in args if isinstance(value, torch.dtype))
        out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
        live.add([out], "masked weights")
        return out, torch.empty((), device=weight.device)

    def masked_weight_backward(
        grad: Tensor | None, grad_norm: Tensor | None, logits: Tensor, *_: Any, accumulate: Tensor | None = None, **__: Any
    ) -> Tensor:
        # The C++ kernel adds in place; the others make an array and add that.
        found = torch.empty_like(logits) if accumulate is None or logits.device.type != "cpu" else accumulate
        out = accumulate if accumulate is not None else found
        live.add([found, out], "gradients of logits")
        return out

    def token_loss(
        student: Tensor, teacher: Tensor | None, labels: Tensor, ce: float, kl: float, want_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        fused = student.device.type == "cpu" and native("loss").library is not None
        scratch = torch.empty(0 if fused else 4 * min(_LOSS_CHUNK, student.numel()), device=student.device)
        grad = torch.empty_like(student) if want_grad else None
        live.add([scratch, *([grad] if grad is not None else [])], "loss")
        return torch.empty((), device=student.device), torch.empty((), device=student.device), grad

    def hard_mask(logits: Tensor, pattern: Pattern, parametrization: str) -> Tensor:
        shape = (*logits.shape[:-2], logits.shape[-2] * pattern.m)
        return torch.empty(shape, dtype=torch.bool, device=logits.device)

    def squared_norm(tensor: Tensor) -> Tensor:
        return torch.empty((), device=tensor.device)

    def received(whole: Tensor, _: Tensor) -> None:
        live.add([whole], "rows of all processes")

    def alone(value: Tensor) -> Tensor:
        return value

    def nothing(*_: Any, **__: Any) -> None:
        return None

    with ExitStack() as stack:
        for owner, name, value in (
            (maskllm.gumbel, "masked_weight", masked_weight),
            (maskllm.gumbel, "masked_weight_backward", masked_weight_backward),
            (maskllm.parametrization, "hard_mask", hard_mask),
            (maskllm.sharding, "masked_weight", masked_weight),
            (maskllm.sharding, "masked_weight_backward", masked_weight_backward),
            (maskllm.sharding, "all_gather", received),
            (maskllm.sharding, "all_to_all", received),
            (maskllm.update, "summed", alone),
            (maskllm.head, "token_loss", token_loss),
            (maskllm.update, "squared_norm", squared_norm),
            (maskllm.update, "accumulate", nothing),
            (MaskAdamW, "_update", nothing),
            # Transformers looks at positions to see whether a row holds several texts, and makes an attention mask when it cannot tell.
            (masking_utils, "find_packed_sequence_indices", nothing),
        ):
            stack.enter_context(_replaced(owner, name, value))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
