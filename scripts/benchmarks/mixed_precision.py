"""Mixed-precision experts at equal bytes: uniform widths, MC's PMQ with its own quantiser, and every granularity and cost of this tool.

For each budget the bytes that PMQ's allocation takes are the limit of all others (uniform widths take what they take). Every row is a run of
the recipe `tiny-moe` with a few keys changed, kept under --out, so that an interrupted benchmark goes on. `--table` prints Markdown.

    python scripts/benchmarks/mixed_precision.py --out runs/mixed
    python scripts/benchmarks/mixed_precision.py --out runs/mixed --table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.quantize.run import run_recipe
from compress.recipe_file import apply_override, check_recipe, recipe_path

PMQ = "pmq, its quantiser"
TUNED = "projection, error, routers tuned"
OURS = {
    "pmq, our quantiser": {"mode": "pmq", "granularity": "expert"},
    "layer, error": {"mode": "error", "granularity": "layer"},
    "expert, error": {"mode": "error", "granularity": "expert"},
    "gate-up, error": {"mode": "error", "granularity": "gate-up"},
    "projection, error": {"mode": "error", "granularity": "projection"},
    "expert, fisher": {"mode": "fisher", "granularity": "expert"},
    "projection, fisher": {"mode": "fisher", "granularity": "projection"},
    TUNED: {"mode": "error", "granularity": "projection"},
    "projection, fisher, routers tuned": {"mode": "fisher", "granularity": "projection"},
}


def recipe(args: argparse.Namespace, **changes: Any) -> Any:
    import yaml

    raw = yaml.safe_load(recipe_path(args.recipe).read_text(encoding="utf-8"))
    raw["export"] = {"format": "none"}
    raw["tune"] = {"steps": 0}
    for override in args.set:
        apply_override(raw, override)
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return check_recipe(raw, args.recipe)


def run(args: argparse.Namespace, budget: float, name: str, made: Any) -> dict[str, Any]:
    folder = args.out / f"{budget:g}-{name.replace(', ', '-').replace(' ', '_')}"
    if not (folder / "summary.json").is_file():
        run_recipe(made, folder, stage="quantize", resume=(folder / "recipe.yaml").is_file(), resume_command="")
    rows = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    facts = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    return {
        "budget": budget,
        "method": name,
        **{k: facts[k] for k in ("average_bits", "expert_bytes", "bits_per_weight")},
        "rows": rows,
    }


def uniform_widths(args: argparse.Namespace, budget: float, mixtures: list[tuple[int, int]]) -> Path:
    """A file of widths for experts that all get the same, or alternately the next lower and the next higher width."""
    file = args.out / f"uniform-{budget:g}.json"
    low, share = int(budget), budget - int(budget)
    layers = {str(layer): [low + (int((e + 1) * share) > int(e * share)) for e in range(count)] for layer, count in mixtures}
    file.write_text(json.dumps({"layers": layers}), encoding="utf-8")
    return file


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    profiles = args.out / "profiles"
    probe = {"profile": {"folder": str(profiles / "rtn"), "method": "rtn"}, "candidates": [1, 2, 3]}
    for budget in args.budgets:
        wanted = {"mode": "pmq", "granularity": "expert", "average_bits": budget}
        published = recipe(args, quantizer={"method": "published"}, allocate=wanted, **probe)
        first = run(args, budget, PMQ, published)
        yield first
        layers = json.loads((args.out / f"{budget:g}-pmq-its_quantiser" / "bits.json").read_text(encoding="utf-8"))["widths"]
        file = uniform_widths(args, budget, [(int(layer), len(experts)) for layer, experts in layers.items()])
        for method in ("rtn", "gptq"):
            allocate = {"average_bits": None, "bits_file": str(file)}
            yield run(args, budget, f"uniform, {method}", recipe(args, quantizer={"method": method}, allocate=allocate))
        for name, choice in OURS.items():
            limit = (
                {"average_bits": budget}
                if choice["mode"] == "pmq"
                else {"average_bits": None, "max_bytes": first["expert_bytes"]}
            )
            changes: dict[str, Any] = {"allocate": {**choice, **limit}}
            if choice["mode"] == "pmq":
                changes |= {"candidates": [1, 2, 3], "profile": {"folder": str(profiles / "gptq-123")}}
            else:
                changes |= {"profile": {"folder": str(profiles / f"gptq-{choice['mode']}")}}
            if "tuned" in name:
                changes["tune"] = {"steps": args.tune_steps}
            yield run(args, budget, name, recipe(args, **changes))


def table(found: list[dict[str, Any]]) -> str:
    texts = list(found[0]["rows"][0]["perplexities"])
    original = found[0]["rows"][0]["perplexities"]
    lines = [
        "| budget | method | average bits | expert bytes | "
        + " | ".join(f"{t} | KL" for t in texts)
        + " | same prediction | routed elsewhere |",
        "| ---: | --- | ---: | ---: |" + " ---: | ---: |" * len(texts) + " ---: | ---: |",
        "| 16 | original | | | " + " | ".join(f"{original[t]:.2f} | " for t in texts) + " | | |",
    ]
    for row in found:
        made = row["rows"][1]
        cells = " | ".join(f"{made['perplexities'][t]:.2f} | {made['kl'][t]:.4f}" for t in texts)
        first = texts[0]
        lines.append(
            f"| {row['budget']:g} | {row['method']} | {row['average_bits']:.3f} | {row['expert_bytes']:,} | {cells} | "
            f"{100 * made['top1_agreement'][first]:.1f} % | {100 * made['rerouted'][first]:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny-moe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0])
    parser.add_argument("--tune-steps", type=int, default=60)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe, for all rows")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    file = args.out / "rows.jsonl"
    if args.table:
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        print(table(found))
        return
    for row in rows(args):
        found.append(row)
        file.write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")
        if args.json:
            print(json.dumps(row), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
