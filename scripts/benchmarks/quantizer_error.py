"""Output error of the quantisers on inputs they were not calibrated on, for real matrices: the tables of docs/quantize.md.

python scripts/benchmarks/quantizer_error.py [--model asset:tiny-moe --layers 0 2] [--group-size 128] [--bits 1 2 3 4] [--json]
python scripts/benchmarks/quantizer_error.py --few-tokens

The error of a matrix is tr((W-Q) H (W-Q)^T) / tr(W H W^T), H the second moment of its inputs on WikiText-2 test. Calibration is on
the embedded Wikipedia text, with the inputs of the unquantised model. A matrix that under 1,000 tokens reach in either text
is left out (its number is printed). "ratio" is the geometric mean over the matrices of the error relative to the published
recipe's, "worst" the largest such ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from compress.calibrate import walk_blocks
from compress.capture import InputStats
from compress.data import TokenBlocks, tokenize
from compress.models import LoadedModel, load_model
from compress.quantize.gptq import gptq, output_error, quantize_matrix, rtn
from compress.quantize.grid import Grid, Quantized
from compress.quantize.published import published
from compress.text import TextSource
from compress.weights import WeightRef, find_weights

CALIBRATION, HELD_OUT = "asset:wikipedia", "asset:wikitext2-test"
ENOUGH = 1000  # tokens


def measure(loaded: LoadedModel, refs: Sequence[WeightRef], text: str, sequences: int, length: int) -> dict[str, InputStats]:
    tokens = tokenize(TextSource(path=text), loaded.tokenizer, 4 * sequences * length)
    batch = TokenBlocks(tokens, length, seed=0).batch(0, sequences)
    found: dict[str, InputStats] = {}
    for _, stats in walk_blocks(loaded.model, refs, batch.split(8), gram=True):
        found.update(stats)
    return found


def methods(weight: Tensor, gram: Tensor, bits: int, group_size: int) -> Iterator[tuple[str, Callable[[], Quantized]]]:
    """Name and quantiser; the first is what the others are compared with, and all up to the last two store what it stores."""
    grid = Grid(bits, group_size, "midrise" if bits == 1 else "float")
    yield "published", lambda: published(weight, gram, bits, group_size)
    yield "rtn, min-max", lambda: rtn(weight, grid, search=False)
    yield "rtn, clip search", lambda: rtn(weight, grid)
    yield "rtn, clip search by H", lambda: rtn(weight, grid, gram.diagonal() + 1e-2 * gram.diagonal().mean())
    yield "gptq, given order", lambda: gptq(weight, gram, grid, order="given", rounds=0)
    yield "gptq, activation order", lambda: gptq(weight, gram, grid, rounds=0)
    yield "gptq + refine", lambda: gptq(weight, gram, grid)
    if bits > 1:
        yield "gptq + refine, asymmetric", lambda: gptq(weight, gram, Grid(bits, group_size, "asymmetric"))
        yield "gptq + refine, symmetric", lambda: gptq(weight, gram, Grid(bits, group_size, "symmetric"))


def compare(
    source: str, layers: Sequence[int], sequences: int, length: int, every_bits: Sequence[int], group_size: int
) -> Iterator[dict[str, Any]]:
    loaded = load_model(source, dtype="float32")
    refs = [ref for ref in find_weights(loaded.model) if ref.layer in layers]
    seen, test = (
        measure(loaded, refs, CALIBRATION, sequences, length),
        measure(loaded, refs, HELD_OUT, max(1, sequences // 2), length),
    )
    used = [ref for ref in refs if min(seen[ref.name].tokens, test[ref.name].tokens) >= ENOUGH]
    print(f"{source}: {len(used)} matrices, {len(refs) - len(used)} left out for want of tokens", file=sys.stderr)
    for bits in every_bits:
        errors: dict[str, list[tuple[float, float, float]]] = {}
        for ref in used:
            weight = ref.view().float()
            gram, held_out = seen[ref.name].gram, test[ref.name].gram
            assert gram is not None
            assert held_out is not None
            for name, run in methods(weight, gram, bits, group_size):
                quantized = run()
                value = quantized.dequantize()
                errors.setdefault(name, []).append(
                    (output_error(weight, value, gram), output_error(weight, value, held_out), quantized.bits_per_weight)
                )
        base = [held for _, held, _ in errors["published"]]
        for name, found in errors.items():
            ratios = [held / other for (_, held, _), other in zip(found, base, strict=True)]
            yield {
                "model": source,
                "bits": bits,
                "group_size": group_size,
                "method": name,
                "bits_per_weight": statistics.fmean(b for _, _, b in found),
                "calibration": statistics.fmean(c for c, _, _ in found),
                "held_out": statistics.fmean(h for _, h, _ in found),
                "ratio": statistics.geometric_mean(ratios),
                "worst": max(ratios),
                "matrices": len(found),
            }


def few_tokens(source: str, layers: Sequence[int], length: int, group_size: int) -> Iterator[dict[str, Any]]:
    """Two bits with ever fewer calibration tokens: held-out error relative to rounding to nearest, by tokens over inputs."""
    loaded = load_model(source, dtype="float32")
    refs = [ref for ref in find_weights(loaded.model) if ref.layer in layers and ref.expert is not None]
    test = measure(loaded, refs, HELD_OUT, 64, length)
    grid = Grid(2, group_size)
    ratios: dict[tuple[int, str], list[float]] = {}
    edges = [0.25, 1, 4, 16, math.inf]
    for sequences in (1, 4, 16, 64):
        for name, stats in measure(loaded, refs, CALIBRATION, sequences, length).items():
            if stats.tokens == 0 or test[name].tokens < ENOUGH:
                continue
            weight = next(ref for ref in refs if ref.name == name).view().float()
            held_out = test[name].gram
            assert stats.gram is not None
            assert held_out is not None
            place = next(i for i, edge in enumerate(edges) if stats.tokens < edge * weight.shape[1])
            plain = output_error(weight, rtn(weight, grid).dequantize(), held_out)
            tried = {
                "damping 0.01": gptq(weight, stats.gram, grid),
                "damping 1": gptq(weight, stats.gram, grid, damping=1.0),
                "damping by tokens": quantize_matrix(weight, stats.gram, grid, tokens=stats.tokens).quantized,
            }
            for method, quantized in tried.items():
                ratios.setdefault((place, method), []).append(output_error(weight, quantized.dequantize(), held_out) / plain)
    for (place, method), found in sorted(ratios.items()):
        yield {
            "model": source,
            "tokens_per_input": [0, *edges][place],
            "method": method,
            "ratio_to_rtn": statistics.geometric_mean(found),
            "worst": max(found),
            "matrices": len(found),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:tiny-moe")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--sequences", type=int, default=192, help="calibration sequences; half as many are held out")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--few-tokens", action="store_true", help="the second table: starved experts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.few_tokens:
        rows = list(few_tokens(args.model, args.layers, args.seqlen, args.group_size))
    else:
        rows = list(compare(args.model, args.layers, args.sequences, args.seqlen, args.bits, args.group_size))
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
