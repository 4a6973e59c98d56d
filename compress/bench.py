"""Time packed products against torch's dense ones on this machine: what `compress bench` and scripts/benchmarks/sparse24_cpu.py print.

A number of a shared machine means something only beside others of the same run, so all variants take turns, product by product. Each has
several copies of its weight and takes them in rotation, so that weights come from memory and not from a cache, as they do in a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from compress_kernels.sparse24 import Packed24

ROTATED_BYTES = 256 << 20
SHAPES = ((4096, 4096), (11008, 4096), (4096, 14336))  # N, K of layers of Llama-2-7B and Mistral-7B
BATCHES = (1, 4, 16, 64, 256)
_DENSE_CONTROL_BATCH = 16  # above it the control says nothing: it has no blocking for large batches
_WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """One variant of the product of x `[batch, k]` with a weight `[n, k]`.

    `microseconds` is the median and `microseconds_p10` the tenth percentile; `gb_per_s` counts the bytes of the weight as stored and
    `share_of_bandwidth` divides by what reading memory alone reached between the repetitions, both at the median.
    """

    op: str
    backend: str
    dtype: str
    n: int
    k: int
    batch: int
    threads: int
    microseconds: float
    microseconds_p10: float
    gb_per_s: float
    share_of_bandwidth: float
    speedup_vs_torch_bf16: float


@dataclass(frozen=True)
class Variant:
    """A product to time: `run(i)` computes it with copy i of its weight; `nbytes` is the size of one copy."""

    backend: str
    dtype: str
    run: Callable[[int], object]
    copies: int
    nbytes: int


def sparse24_timings(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
    *,
    threads: int,
    repetitions: int = 25,
    rotated_bytes: int = ROTATED_BYTES,
) -> Iterator[Timing]:
    """Time every variant for each shape and batch, with random 2:4 weights; yields the rows of one case when it is done.

    Raises UsageError for a K that is not a multiple of 4, and CompressError when the compiled kernels are not there.
    """
    from compress_kernels.native import native

    found = native("sparse24")
    if found.library is None:
        raise CompressError(f"there is nothing to time: the compiled 2:4 kernels are not available ({found.reason})")
    if any(k % 4 for _, k in shapes):
        raise UsageError(f"2:4 layers have a multiple of 4 inputs; the shapes are N x K: {shapes}")
    with threads_of_torch(threads):
        read = _read(rotated_bytes)
        for n, k in shapes:
            weights = _weights(n, k, rotated_bytes)
            for batch in batches:
                variants = _variants(weights, batch)
                runs = [*variants, read]
                *seconds, reading = interleaved([v.run for v in runs], [v.copies for v in runs], repetitions)
                bandwidth = read.nbytes / statistics.median(reading) / 1e9
                base = statistics.median(seconds[0])
                for variant, spent in zip(variants, seconds, strict=True):
                    median = statistics.median(spent)
                    rate = variant.nbytes / median / 1e9
                    yield Timing(
                        op="linear",
                        backend=variant.backend,
                        dtype=variant.dtype,
                        n=n,
                        k=k,
                        batch=batch,
                        threads=threads,
                        microseconds=median * 1e6,
                        microseconds_p10=sorted(spent)[len(spent) // 10] * 1e6,
                        gb_per_s=rate,
                        share_of_bandwidth=rate / bandwidth,
                        speedup_vs_torch_bf16=base / median,
                    )


def interleaved(runs: Sequence[Callable[[int], object]], copies: Sequence[int], repetitions: int) -> list[list[float]]:
    """Seconds of each repetition of each run, which take turns; `runs[i]` is called with 0, 1, ... `copies[i]` - 1, 0, ..."""
    for run, count in zip(runs, copies, strict=True):
        for i in range(_WARM_UP):
            run(i % count)
    seconds: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions):
        for run, count, spent in zip(runs, copies, seconds, strict=True):
            index = (repetition + _WARM_UP) % count
            spent.append(_seconds(lambda run=run, index=index: run(index)))  # type: ignore[misc]
    return seconds


def random_sparse24(n: int, k: int, seed: int = 0) -> Tensor:
    """fp32 `[n, k]` as large as a layer's weights, of which two in every group of four, at random, are zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 0.02
    pruned = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)[..., :2]
    weight.view(n, k // 4, 4).scatter_(-1, pruned, 0.0)
    return weight


def _weights(n: int, k: int, rotated_bytes: int) -> dict[tuple[str, str], list]:
    """Copies of one weight for every (backend, dtype). None are shared: whoever came second would find them in a cache."""
    import torch

    from compress_kernels.sparse24 import Packed24, pack

    weight = random_sparse24(n, k)
    low, int8 = weight.bfloat16(), pack(weight, torch.int8)
    originals: dict[tuple[str, str], Tensor | Packed24] = {
        ("torch", "bf16"): low,
        ("torch", "fp32"): weight,
        ("dense control", "bf16"): low,
        ("2:4", "bf16"): pack(low),
        ("2:4", "fp32"): pack(weight),
        ("2:4", "int8 a8"): int8,
        ("2:4", "int8 a16"): int8,
    }

    def clone(original: Tensor | Packed24) -> Tensor | Packed24:
        if isinstance(original, Packed24):
            return Packed24(*(None if part is None else part.clone() for part in original))
        return original.clone()

    return {
        name: [clone(original) for _ in range(max(2, -(-rotated_bytes // original.nbytes)))]
        for name, original in originals.items()
    }


def _variants(weights: dict[tuple[str, str], list], batch: int) -> list[Variant]:
    """All products with a batch of tokens; torch's bf16 one, the base of the comparison, first."""
    import torch
    from torch.nn.functional import linear as dense

    from compress_kernels import sparse24
    from compress_kernels.sparse24 import cpu

    k = weights["torch", "fp32"][0].shape[1]
    x = torch.randn(batch, k, generator=torch.Generator().manual_seed(batch))
    x16 = x.bfloat16()
    products: dict[tuple[str, str], Callable[[Any], object]] = {
        ("torch", "bf16"): lambda w: dense(x16, w),
        ("torch", "fp32"): lambda w: dense(x, w),
        ("dense control", "bf16"): lambda w: cpu.dense_linear(x16, w),
        ("2:4", "bf16"): lambda w: sparse24.linear(x16, w),
        ("2:4", "fp32"): lambda w: sparse24.linear(x, w),
        ("2:4", "int8 a8"): lambda w: sparse24.linear(x16, w, None, "int8"),
        ("2:4", "int8 a16"): lambda w: sparse24.linear(x16, w),
    }
    if batch > _DENSE_CONTROL_BATCH:
        del products["dense control", "bf16"]

    def variant(name: tuple[str, str], product: Callable[[Any], object]) -> Variant:
        copies = weights[name]
        return Variant(*name, lambda i: product(copies[i]), len(copies), copies[0].nbytes)

    return [variant(name, product) for name, product in products.items()]


def _read(nbytes: int) -> Variant:
    """Reading memory alone: the probe of its bandwidth."""
    import torch

    from compress_kernels.sparse24 import cpu

    buffer = torch.ones(nbytes // 8, dtype=torch.int64)
    return Variant("read", "", lambda i: cpu.read(buffer), 1, buffer.nbytes)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """torch, and the kernels with it, use `count` threads and no gradients meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
