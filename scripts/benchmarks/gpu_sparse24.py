"""Time every implementation of the 2:4 product, and the soft mask, on an NVIDIA GPU, against torch's dense bf16 product and eager torch.

python scripts/benchmarks/gpu_sparse24.py [--json] [--shapes 4096x4096 11008x4096] [--batches 1 4 16] [--values bfloat16 int8] [--quick]

Times are medians with cold caches, launch overhead excluded (`compress_kernels.sparse24.cuda.measure`). GB/s counts each byte of the
stored weight, the activations and the result once (for `unpack` also the dense copy written and read); its share is of the bandwidth
that copying a gigabyte reaches. A speed-up is over `F.linear` with a dense bf16 weight of the same shape; for the soft mask, over
reference.py on the same GPU. Rows whose `backend` is "chosen" name what `linear` takes by itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from compress_kernels.gumbel import Draw, reference, stream_key
from compress_kernels.sparse24 import cuda
from compress_kernels.sparse24.backends import Case, candidates
from compress_kernels.sparse24.packing import Packed24, pack, unpack
from maskllm.patterns import Pattern

COLUMNS = (
    "op",
    "backend",
    "dtype",
    "n",
    "k",
    "batch",
    "microseconds",
    "gb_per_s",
    "share_of_bandwidth",
    "speedup_vs_torch_bf16",
    "note",
)
DEVICE = torch.device("cuda", 0)


def bandwidth() -> float:
    """Bytes a microsecond that a copy of one gigabyte within the GPU reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / cuda.measure(lambda: target.copy_(source), DEVICE)


def random_packed(n: int, k: int, value_dtype: torch.dtype) -> Packed24:
    generator = torch.Generator(DEVICE).manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator, device=DEVICE)
    pruned = torch.rand(n, k // 4, 4, generator=generator, device=DEVICE).argsort(-1)[..., :2]
    return pack(weight.view(n, k // 4, 4).scatter(-1, pruned, 0.0).view(n, k), value_dtype)


def moved(name: str, packed: Packed24, state: Any, dense: int) -> int:
    """Bytes of the weight that an implementation reads, and those of a copy it writes."""
    if name == "dense":
        return dense
    if name == "unpack":
        return packed.nbytes + 2 * dense
    return state.nbytes if name == "cusparselt" else packed.nbytes


def timing(microseconds: float, size: int, peak: float, baseline: float) -> dict[str, float]:
    """The columns that follow from a time."""
    rate = size / microseconds
    shares = {"gb_per_s": rate / 1000, "share_of_bandwidth": rate / peak}
    return {"microseconds": microseconds, **shares, "speedup_vs_torch_bf16": baseline / microseconds}


def products(n: int, k: int, value_dtype: torch.dtype, batches: list[int], peak: float) -> Iterator[dict[str, Any]]:
    """One row for each implementation and batch."""
    packed = random_packed(n, k, value_dtype)
    x_dtype = torch.bfloat16 if value_dtype == torch.int8 else value_dtype
    dense_bf16, exact = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16), unpack(packed, torch.float32)
    for batch in batches:
        x = torch.randn(batch, k, device=DEVICE).to(x_dtype)
        x_bf16, wanted = x.to(torch.bfloat16), functional.linear(x.float(), exact)
        other = x.nbytes + batch * n * x.itemsize
        baseline = cuda.measure(functools.partial(functional.linear, x_bf16, dense_bf16), DEVICE)
        shape = {"op": "linear", "n": n, "k": k, "batch": batch}
        yield {**shape, "backend": "torch", "dtype": "bfloat16", **timing(baseline, dense_bf16.nbytes + other, peak, baseline)}
        case, sizes = Case.of(x, packed), {}
        for backend in candidates(case):
            row = {**shape, "backend": backend.name, "dtype": _name(value_dtype)}
            try:
                state = backend.prepare(packed, case)
                call = functools.partial(backend.run, x, packed, None, state)
                error = float((call().float() - wanted).norm() / wanted.norm())
                time = cuda.measure(call, DEVICE)
            except Exception as failure:  # a library that refuses this GPU: a row that says so
                yield {**row, "note": f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0]:.100}"}
                continue
            sizes[backend.name] = moved(backend.name, packed, state, case.dense_bytes) + other
            note = "" if error < 0.01 else f"WRONG: relative error {error:.3g}"
            yield {**row, **timing(time, sizes[backend.name], peak, baseline), "note": note}
        cuda.linear(x, *packed)
        chosen = next(choice.backend for choice in cuda.choices() if choice.case == case)
        time = cuda.measure(functools.partial(cuda.linear, x, *packed), DEVICE)
        row = {**shape, "backend": "chosen", "dtype": _name(value_dtype), "note": chosen}
        yield {**row, **timing(time, sizes[chosen], peak, baseline)}
    cuda.forget()


def soft_masks(n: int, k: int, pattern: Pattern, peak: float) -> Iterator[dict[str, Any]]:
    """Forward and backward of the soft mask of a weight `[n, k]`, by Triton and by torch."""
    from compress_kernels.gumbel import triton as kernels

    table = pattern.candidates().float().to(DEVICE)
    groups = n * k // pattern.m
    weight = torch.randn(groups, pattern.m, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn_like(weight)
    draw = Draw(tau=2.0, kappa=100.0, noise_key=stream_key(0, 1))
    for scores in (False, True):
        logits = 0.01 * torch.randn(groups, pattern.m if scores else pattern.count, device=DEVICE)
        forward = (logits, weight, table, scores, draw, torch.bfloat16, True)
        backward = (grad, None, logits, weight, table, scores, draw)
        sizes = {"forward": logits.nbytes + 2 * weight.nbytes, "backward": 2 * logits.nbytes + 2 * weight.nbytes}
        for op, size in sizes.items():
            calls = {
                name: functools.partial(module.masked_weight, *forward)
                if op == "forward"
                else functools.partial(module.masked_weight_backward, *backward)
                for name, module in (("torch", reference), ("triton", kernels))
            }
            times = {name: cuda.measure(call, DEVICE) for name, call in calls.items()}
            row = {"op": f"soft mask {op}, {pattern} {'scores' if scores else 'patterns'}", "dtype": "bfloat16", "n": n, "k": k}
            for name, time in times.items():
                yield {**row, "backend": name, **timing(time, size, peak, times["torch"]), "note": "speed-up over eager torch"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x14336"], metavar="NxK")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 256, 2048])
    parser.add_argument("--values", nargs="+", default=["bfloat16", "float16", "int8"], choices=["bfloat16", "float16", "int8"])
    parser.add_argument("--quick", action="store_true", help="one shape, four batches, bf16 only")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.batches, options.values = ["4096x4096"], [1, 4, 16, 512], ["bfloat16"]
    if not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU and a CUDA build of torch.", file=sys.stderr)
        return 1
    torch.cuda.set_device(DEVICE)
    peak = bandwidth()
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        n, k = map(int, shape.split("x"))
        for values in options.values:
            print(f"linear {shape} {values}", file=sys.stderr)
            rows += products(n, k, getattr(torch, values), options.batches, peak)
    for pattern in (Pattern(2, 4), Pattern(4, 8)):
        print(f"soft mask {pattern}", file=sys.stderr)
        rows += soft_masks(4096, 4096, pattern, peak)
    import triton

    machine = {"gpu": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__, "triton": triton.__version__}
    machine["copy_gb_per_s"] = peak / 1000
    rows = [{column: row.get(column) for column in COLUMNS} for row in rows]
    if options.json:
        print(json.dumps({**machine, "rows": rows}, indent=1))
        return 0
    print("  ".join(f"{key} {_cell(value)}" for key, value in machine.items()))
    table = [list(COLUMNS), *([_cell(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
