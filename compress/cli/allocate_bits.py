"""`compress allocate-bits`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.moe.allocate import Allocation, Budget
    from compress.moe.modes import Options
    from compress.moe.statistics import ExpertStatistics

_SHOWN_EXPERTS = 64  # layers with more experts are summed up by their histograms alone


def allocate_bits(
    stats: Annotated[Path, typer.Option("--stats", help="JSON file of what was measured of the experts; its form is above.")],
    average_bits: Annotated[
        float | None, typer.Option("--average-bits", help="Budget: average bits of an expert weight, codes alone.")
    ] = None,
    max_bytes: Annotated[
        float | None, typer.Option("--max-bytes", help="Budget: bytes of all experts, with scales, zero points and padding.")
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option("--bits-per-weight", help="Budget: bits per weight of the whole model, everything counted.")
    ] = None,
    mode: Annotated[
        Literal["pmq", "error", "fisher"],
        typer.Option(
            "--mode", help="pmq: layer by layer as in MC. error: squared output error. fisher: gradient-weighted error."
        ),
    ] = "pmq",
    bits: Annotated[
        str | None, typer.Option("--bits", metavar="B,B,...", help="Candidate widths. Default: all that were measured.")
    ] = None,
    exponents: Annotated[
        str,
        typer.Option(
            "--pmq-exponents",
            metavar="A,B,C",
            help="Of frequency, weight and loss in pmq. The MC paper states 1,1,2; its files are 1,1.5,1.",
        ),
    ] = "1,1.5,1",
    floor: Annotated[
        list[str] | None,
        typer.Option("--floor", metavar="GLOB=BITS", help="At least so many bits for these experts; repeatable."),
    ] = None,
    ceiling: Annotated[
        list[str] | None,
        typer.Option("--ceiling", metavar="GLOB=BITS", help="At most so many bits for these experts; repeatable."),
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", metavar="GLOB", help="The widest candidate for these experts; repeatable.")
    ] = None,
    gap: Annotated[
        float, typer.Option("--gap", min=0, help="Stop within this fraction of the bound. 0 asks for a proven optimum.")
    ] = 0.0,
    solver: Annotated[
        Literal["auto", "highs"],
        typer.Option("--solver", help="auto: convex hulls and a core, HiGHS where rules need it. highs: HiGHS for everything."),
    ] = "auto",
    curve: Annotated[
        Path | None,
        typer.Option("--curve", help="Also write the trade-off of cost and size at 20 budgets, as a picture (.png) or .json."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON object to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose how many bits each expert gets, from measured statistics, without the model.

    The least summed cost within the budget, with a proven lower bound and the gap to it. Experts are named `layers.L.experts.E`
    in globs. With `--curve` no budget is needed.

    **Statistics**: an object with `quant_loss` (by layer, expert, bits: Frobenius norm of the change of the MoE block's output when
    this expert alone is quantised) or, for mode fisher, `fisher` (sum of squared gradient times squared change); for pmq also
    `frequency` and `weight` (by layer, expert: selections, summed routing weight). Layers: a list, null where there are no experts,
    or an object keyed by layer index. Experts: a list, or an object keyed 0, 1, ... Losses of an expert: an object keyed by bits,
    or a list in the order of the key `bits`. For budgets in bytes also `expert_shapes` (`[out, in]` of each matrix of an expert),
    and optionally `group_size` (128), `scale_bits` (16), `zero_bits` (as the codes), `other_weights` and `other_bytes` (the rest of
    the model).

        {"bits": [1, 2, 3], "frequency": [[10, 20]], "weight": [[4.0, 9.5]],
         "quant_loss": [[[9, 4, 1], [7, 3, 1]]]}

    **Examples**

    - `compress allocate-bits --stats experts.json --average-bits 2.5`
    - `compress allocate-bits --stats experts.json --average-bits 2.5 --mode error --bits 1,2,3 --json --out bits.json`
    - `compress allocate-bits --stats experts.json --bits-per-weight 3 --mode fisher --floor "layers.0.*=3"`
    - `compress allocate-bits --stats experts.json --mode error --curve curve.png`
    """
    from compress.moe.allocate import Budget, Limit
    from compress.moe.modes import Options, allocate_experts
    from compress.moe.statistics import load_statistics

    given = [
        (value, measure)
        for value, measure in ((average_bits, "average-bits"), (max_bytes, "bytes"), (bits_per_weight, "bits-per-weight"))
        if value is not None
    ]
    if len(given) > 1 or not (given or curve):
        raise UsageError("give one budget: --average-bits, --max-bytes or --bits-per-weight (with --curve none is needed)")
    if curve is not None and curve.suffix not in (".png", ".json"):
        raise UsageError(f"--curve {curve}: the name must end in .png or .json")
    if not given and (out or json_):
        raise UsageError(
            "--out and --json are for an allocation, which needs a budget: --average-bits, --max-bytes or --bits-per-weight"
        )
    for file in (curve, out):
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"{file}: the folder {file.parent} does not exist")
    statistics = load_statistics(stats)
    limits = [Limit(glob, floor=value) for glob, value in map(_glob_bits, floor or [])]
    limits += [Limit(glob, ceiling=value) for glob, value in map(_glob_bits, ceiling or [])]
    options = Options(
        mode, _widths(bits) if bits else (), _exponents(exponents), tuple(limits), tuple(protect or ()), gap, solver
    )
    if given:
        budget = Budget(given[0][0], given[0][1], statistics.other_weights, statistics.other_bytes)  # type: ignore[arg-type]
        allocation = allocate_experts(statistics, budget, options)
        result = _to_json(statistics, allocation, budget, options)
        if out is not None:
            from compress.rundir import write_atomic

            write_atomic(out, json.dumps(result) + "\n")
        if json_:
            typer.echo(json.dumps(result))
        else:
            _print(result)
    if curve is not None:
        _write_curve(curve, statistics, options)


def _glob_bits(text: str) -> tuple[str, int]:
    glob, separator, value = text.rpartition("=")
    if not separator or not glob or not value.isdigit():
        raise UsageError(f"{text!r} is not GLOB=BITS, like 'layers.0.*=3'")
    return glob, int(value)


def _widths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--bits {text}: must be widths like 1,2,3")
    return tuple(map(int, parts))


def _exponents(text: str) -> tuple[float, float, float]:
    try:
        alpha, beta, gamma = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--pmq-exponents {text}: must be three numbers like 1,1.5,1") from None
    if not all(0 <= x < 100 for x in (alpha, beta, gamma)):
        raise UsageError(f"--pmq-exponents {text}: must be from 0 to 100")
    return alpha, beta, gamma


def _to_json(statistics: ExpertStatistics, allocation: Allocation, budget: Budget, options: Options) -> dict[str, Any]:
    from compress.moe.modes import widths_by_layer

    layers = widths_by_layer(statistics, allocation)
    experts = sum(map(len, layers.values()))
    weights, other = statistics.expert_weights * experts, (statistics.other_weights, statistics.other_bytes)
    result: dict[str, Any] = {
        "mode": options.mode,
        "bits": sorted(options.bits or statistics.bits),
        "budget": {budget.measure: budget.limit},
        **({"exponents": list(options.exponents)} if options.mode == "pmq" else {}),
        **allocation.to_json(),
        "layers": {str(index): widths for index, widths in layers.items()},
    }
    if allocation.nbytes is not None:
        result["bits_per_weight"] = 8 * allocation.nbytes / weights
        if all(other):
            result["model_bits_per_weight"] = 8 * (allocation.nbytes + other[1]) / (weights + other[0])
    return result


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from compress.cli.tables import stdout

    console = stdout()
    widths = result["bits"]
    few = max(map(len, result["layers"].values())) <= _SHOWN_EXPERTS
    table = Table("layer", *(["bits of its experts"] if few else []), *[f"{b}-bit" for b in widths], "average")
    for column in table.columns[1 + few :]:
        column.justify = "right"
    for index, layer in result["layers"].items():
        text = ["".join(map(str, layer)) if max(widths) < 10 else " ".join(map(str, layer))] if few else []
        table.add_row(index, *text, *[str(layer.count(b)) for b in widths], f"{sum(layer) / len(layer):.3f}")
    everyone = [b for layer in result["layers"].values() for b in layer]
    table.add_section()
    counts = [f"{everyone.count(b):,}" for b in widths]
    table.add_row("all", *([""] if few else []), *counts, f"{sum(everyone) / len(everyone):.3f}")
    console.print(table)
    facts = Table("measure", "value", show_header=False)
    for b, n in zip(widths, map(everyone.count, widths), strict=True):
        facts.add_row(f"{b}-bit experts", f"{'█' * round(40 * n / len(everyone))} {n:,} ({100 * n / len(everyone):.1f} %)")
    facts.add_row("cost", f"[bold]{result['objective']:.6g}[/] ({result['mode']})")
    facts.add_row("proven lower bound", f"{result['bound']:.6g} (of the linear relaxation {result['lp_bound']:.6g})")
    facts.add_row("gap", f"{100 * result['gap']:.6f} %" if result["gap"] else "0, optimal")
    facts.add_row("average bits", f"{result['average_bits']:.4f} (codes alone)")
    if result["nbytes"] is not None:
        facts.add_row("bytes", f"{result['nbytes']:,} ({result['bits_per_weight']:.4f} bits per expert weight)")
    if "model_bits_per_weight" in result:
        facts.add_row("whole model", f"{result['model_bits_per_weight']:.4f} bits per weight")
    facts.add_row("solved by", f"{result['method']}, {result['seconds']:.2f} s")
    console.print(facts)


def _write_curve(file: Path, statistics: ExpertStatistics, options: Options) -> None:
    from compress import console
    from compress.moe.curve import draw, trade_off

    with console.task("trade-off", 1) as bar:
        found = trade_off(statistics, options, progress=lambda done, total: bar.update(done, total=total))
    for note in found["notes"]:
        console.log.print(f"[yellow]note:[/] {note}", soft_wrap=True)
    content = json.dumps(found).encode() + b"\n" if file.suffix == ".json" else draw(found)
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    console.log.print(f"wrote {file}", soft_wrap=True)
