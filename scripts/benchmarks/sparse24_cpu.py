"""Time the packed 2:4 product on this CPU against torch's dense ones, with large layers and a few batches.

    python scripts/benchmarks/sparse24_cpu.py --threads 2

The machine should have nothing else to do. Each line says how long a product takes, at which rate its weights were read, which share
that is of what memory gives, and how many times faster than torch's bf16 product of the same run it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from compress.bench import BATCHES, SHAPES, sparse24_timings

COLUMNS = "{:>6} x {:<6} {:>5}  {:14} {:9} {:>10} {:>10} {:>8} {:>7} {:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="NxK,NxK,...")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    batches = [int(batch) for batch in options.batches.split(",")]
    if not options.json:
        print(COLUMNS.format("N", "K", "batch", "backend", "dtype", "us", "us (p10)", "GB/s", "share", "speedup"))
    for row in sparse24_timings(shapes, batches, threads=options.threads, repetitions=options.repetitions):
        if options.json:
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        else:
            numbers = f"{row.microseconds:.1f}", f"{row.microseconds_p10:.1f}", f"{row.gb_per_s:.1f}"
            share, speedup = f"{row.share_of_bandwidth:.0%}", f"{row.speedup_vs_torch_bf16:.2f}"
            print(COLUMNS.format(row.n, row.k, row.batch, row.backend, row.dtype, *numbers, share, speedup), flush=True)


if __name__ == "__main__":
    main()
