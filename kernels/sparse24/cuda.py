"""The 2:4 product on a GPU: several implementations, and a choice between them by measurement.

Which one is fastest depends on the GPU, the shape and the number of tokens, and sparse is not always faster than dense. The first
product of each (device, shape, power of two of tokens, types) therefore times all candidates on its own weight, and later ones take the
fastest; `choices()` tells what was chosen and what was measured. The candidates:

- `gemv R x W`: the Triton kernel of triton.py, one to four tokens. `mma_sp T x W`: sparse tensor cores, mma_sp.py, up to 64 tokens.
- `cusparselt`, `cutlass`: torch's kernels, semi_structured.py.
- `unpack`: a dense copy made for the call and torch's dense product. It is what remains where nothing else fits.
- `dense`: torch's dense product with a dense copy that is kept, where memory allows, and only if it is faster by more than
  `DENSE_MARGIN`: what was packed to be small is not made large again for nothing.

No GPU has run this yet; tests/gpu is for the first one that does.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from compress_kernels.sparse24.backends import Backend, Case, candidates, unpack_linear
from compress_kernels.sparse24.packing import Packed24

DENSE_MARGIN = 1.05
_RESERVE = 0.1  # of a GPU's memory, which copies of weights leave free
_REPETITIONS = 20
_FLUSH_BYTES = 256 << 20  # written before each measurement: more than any second-level cache


@dataclass(frozen=True)
class Choice:
    """The outcome of one probe: microseconds of every candidate that ran, and why others did not."""

    case: Case
    ranking: tuple[str, ...]
    microseconds: dict[str, float]
    failures: dict[str, str]

    @property
    def backend(self) -> str:
        """What is used; where its copy of a weight does not fit into memory, the next of the ranking."""
        return self.ranking[0]


_choices: dict[Case, Choice] = {}
_prepared = WeakTensorKeyDictionary()  # values -> {first word of the backend's name: its state}, and a stamp


def linear(x: Tensor, values: Tensor, meta: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """y `[..., N]`, in the dtype of x, = x `[..., K]` W^T + bias, W packed as `packing.Packed24` describes; all on one CUDA device.

    Unlike the reference, the sparse implementations do not multiply pruned weights at all: a NaN or an infinity of x reaches only the
    outputs that keep its column. Gradients flow to x (by `unpack`), not to the weight.
    """
    packed = Packed24(values, meta, scale)
    tokens = x.reshape(-1, packed.shape[1])
    bias = None if bias is None else bias.to(x.dtype)
    with torch.cuda.device(x.device):
        if len(tokens) == 0 or (torch.is_grad_enabled() and x.requires_grad):
            y = unpack_linear(tokens, packed, bias)
        else:
            y = _run(_aligned(tokens), packed, bias)
    return y.view(*x.shape[:-1], packed.shape[0])


def linear_by(name: str, x: Tensor, packed: Packed24, bias: Tensor | None = None) -> Tensor:
    """The product x `[batch, K]` by one implementation, for tests and comparisons. Raises ValueError when it does not take the case."""
    x = _aligned(x)
    case = Case.of(x, packed)
    backends = {backend.name: backend for backend in candidates(case)}
    if name not in backends:
        raise ValueError(f"{name} does not take {case}; {', '.join(backends)} do")
    with torch.cuda.device(x.device):
        return backends[name].run(x, packed, bias, _state(backends[name], packed, case))


def choices() -> list[Choice]:
    """What has been chosen in this process so far, in the order of the probes."""
    return list(_choices.values())


def forget() -> None:
    """Drop all choices and what was prepared for them."""
    _choices.clear()
    _prepared.clear()


def _run(tokens: Tensor, packed: Packed24, bias: Tensor | None) -> Tensor:
    case = Case.of(tokens, packed)
    backends = {backend.name: backend for backend in candidates(case)}
    if case not in _choices and torch.cuda.is_current_stream_capturing():
        ranking = tuple(
            name for name in backends if name.startswith(("gemv", "mma_sp", "unpack"))
        )  # timing would break the capture
    else:
        if case not in _choices:
            _choices[case] = probe(packed, bias, case)
        ranking = _choices[case].ranking
    for name in ranking:
        backend = backends[name]
        if _is_prepared(backend, packed) or _fits(backend, case):
            return backend.run(tokens, packed, bias, _state(backend, packed, case))
    raise RuntimeError("not reached: `unpack` prepares nothing")


def probe(packed: Packed24, bias: Tensor | None, case: Case) -> Choice:
    """Time every candidate on this weight with as many random tokens as the bucket has."""
    x = torch.randn(case.bucket, case.k, device=case.device).to(case.x_dtype)
    microseconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for backend in candidates(case):
        if not _fits(backend, case):
            failures[backend.name] = "its copy of the weight does not fit into memory"
            continue
        try:
            state = backend.prepare(packed, case)
            microseconds[backend.name] = measure(functools.partial(backend.run, x, packed, bias, state), case.device)
        except Exception as error:  # a library that refuses this GPU or shape, in whatever way: not a candidate here
            failures[backend.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
    if "unpack" not in microseconds:
        raise RuntimeError(f"the dense product of {case} failed: {failures.get('unpack')}")
    return Choice(case, rank(microseconds), microseconds, failures)


def rank(microseconds: dict[str, float]) -> tuple[str, ...]:
    """The candidates' names, fastest first; `dense` pays DENSE_MARGIN for the memory it takes."""
    return tuple(sorted(microseconds, key=lambda name: microseconds[name] * (DENSE_MARGIN if name == "dense" else 1.0)))


def measure(call: Callable[[], Any], device: torch.device, repetitions: int = _REPETITIONS) -> float:
    """Median time of a call on a device in microseconds, with cold caches, after three calls to warm up."""
    for _ in range(3):
        call()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, end in events:
        flush.zero_()  # also keeps the GPU busy while the call is queued, so that launching it is not timed
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1000


def _aligned(tokens: Tensor) -> Tensor:
    """The tokens contiguous and on a 16-byte boundary, as the kernels read them."""
    tokens = tokens.contiguous()
    return tokens if tokens.data_ptr() % 16 == 0 else tokens.clone()


def _fits(backend: Backend, case: Case) -> bool:
    """Whether there is memory for what `backend` makes of one more weight, and a reserve."""
    wanted = backend.extra_bytes(case)
    if wanted == 0:
        return True
    free, total = torch.cuda.mem_get_info(case.device)
    cached = torch.cuda.memory_reserved(case.device) - torch.cuda.memory_allocated(case.device)
    return wanted <= free + cached - _RESERVE * total


def _stamp(packed: Packed24) -> tuple[int, ...]:
    """Differs when the weight's storage was replaced or, where torch counts that, written to."""
    tensors = [tensor for tensor in packed if tensor is not None]
    return (*(tensor.data_ptr() for tensor in tensors), *(tensor._version for tensor in tensors if not tensor.is_inference()))


def _is_prepared(backend: Backend, packed: Packed24) -> bool:
    kept = _prepared.get(packed.values)
    return kept is not None and kept["stamp"] == _stamp(packed) and backend.name.split()[0] in kept


def _state(backend: Backend, packed: Packed24, case: Case) -> Any:
    """What `backend.prepare` makes of a weight, made once and kept as long as the weight's values live."""
    kept = _prepared.get(packed.values)
    if kept is None or kept["stamp"] != _stamp(packed):
        kept = _prepared[packed.values] = {"stamp": _stamp(packed)}
    key = backend.name.split()[0]
    if key not in kept:
        kept[key] = backend.prepare(packed, case)
    return kept[key]
