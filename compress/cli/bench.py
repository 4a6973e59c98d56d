"""`compress bench`."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Annotated, Any

import typer


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models to time whole: folders (packed or dense), .gguf files, hub names."),
    ] = None,
    shapes: Annotated[
        str, typer.Option("--shapes", help="Layers to time, as OUTxIN,...; without models.")
    ] = "4096x4096,11008x4096,4096x14336",
    batches: Annotated[str, typer.Option("--batches", help="Tokens at once.")] = "1,4,16,64,256",
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Type of activations and dense weights; repeat it to compare types.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate after it.")] = 128,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, help="Turns; 25 for layers, 3 for models by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads; all cores by default.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time packed 2:4 layers against dense ones, or whole models against each other, on this machine.

    Without models: single layers, weights rotated through memory so that caches do not hold them, each as torch computes it and as
    the packed kernels do; the share is of what reading memory alone reaches in the same run. With models: tokens a second
    of prompt (prefill) and of generation (decode); "control" is a dense bfloat16 model decoded by the code for packed ones, so that what this gains
    is not taken for what sparsity does. Where there is a GPU, what was found fastest there for each shape and number of
    tokens is shown too. Leave the machine alone meanwhile.

    **Examples**

    - `compress bench`
    - `compress bench --shapes 1536x576 --batches 1,4 --threads 1`
    - `compress bench my-sparse-model my-packed-model --dtype bfloat16 --dtype float32`
    """
    from compress import bench_gpu
    from compress.console import log
    from compress.errors import CompressError, UsageError

    gpu_reason = bench_gpu.unavailable()
    count = threads or os.cpu_count() or 1
    if models:
        from compress.bench_model import model_timings

        timings: list[Any] = model_timings(
            models, dtype or ["auto"], threads=count, prompt_tokens=prompt_tokens, new_tokens=new_tokens, turns=repeats or 3
        )
    else:
        from compress.bench import sparse24_timings

        try:
            sizes = [tuple(map(int, shape.lower().split("x"))) for shape in shapes.split(",")]
            tokens = [int(batch) for batch in batches.split(",")]
            wanted = [(n, k) for n, k in sizes]
        except ValueError as error:
            raise UsageError(
                f"--shapes {shapes} --batches {batches}: write shapes as 4096x4096,11008x4096 and batches as 1,4,16"
            ) from error
        try:
            timings = list(sparse24_timings(wanted, tokens, threads=count, repetitions=repeats or 25))
        except CompressError as error:
            if gpu_reason or isinstance(error, UsageError):
                raise
            log.print(f"CPU: {error}", markup=False)
            timings = []
        if not gpu_reason:
            bench_gpu.probe(wanted, tokens)
    chosen = bench_gpu.choices()
    if json_:
        gpu = {"reason": gpu_reason, "choices": [dataclasses.asdict(choice) for choice in chosen]}
        typer.echo(json.dumps({"timings": [dataclasses.asdict(row) for row in timings], "gpu": gpu}))
        return
    if timings:
        _print_models(timings) if models else _print_layers(timings)
    _print_choices(chosen, gpu_reason)


def _print_layers(timings: list[Any]) -> None:
    from rich.table import Table

    from compress.cli.tables import stdout

    table = Table("layer", "batch", "backend", "type", "µs", "GB/s", "of the roof", "x torch bf16")
    for column in table.columns[1:]:
        column.justify = "right"
    before = None
    for row in timings:
        case = (row.n, row.k, row.batch)
        if before not in (None, case):
            table.add_section()
        before = case
        table.add_row(
            f"{row.n} x {row.k}",
            str(row.batch),
            row.backend,
            row.dtype,
            f"{row.microseconds:,.0f}",
            f"{row.gb_per_s:.1f}",
            f"{100 * row.share_of_bandwidth:.0f} %",
            f"{row.speedup_vs_torch_bf16:.2f}",
        )
    stdout().print(table)


def _print_models(timings: list[Any]) -> None:
    from rich.table import Table

    from compress.cli.tables import stdout

    table = Table("model", "weights", "activations", "MB", "prefill tokens/s", "decode tokens/s", "x prefill", "x decode")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in timings:
        table.add_row(
            row.model,
            row.backend,
            row.dtype,
            f"{row.weight_bytes / 1e6:,.0f}",
            f"{row.prefill_tokens_per_second:,.1f}",
            f"{row.decode_tokens_per_second:,.1f}",
            f"{row.speedup_prefill:.2f}",
            f"{row.speedup_decode:.2f}",
        )
    stdout().print(table)


def _print_choices(chosen: list[Any], reason: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from compress.cli.tables import stdout

    if not chosen:
        stdout().print(f"2:4 on a GPU: nothing chosen: {reason or 'no packed product ran there'}", markup=False)
        return
    table = Table("2:4 on the GPU", "chosen; the others, µs")
    for choice in chosen:
        table.add_row(escape(choice.case), escape(str(choice)))
    stdout().print(table)
