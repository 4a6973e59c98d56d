"""Learned routing against its training-free rules at the same activation, and what skipping saves: the tables of docs/routing.md.

python scripts/benchmarks/routing.py quality [--model asset:tiny-moe] [--fake-bits] [--targets 0.8 0.65 0.5] [--out FOLDER] [--set KEY=VALUE ...]
python scripts/benchmarks/routing.py speed [--routed FOLDER ...] [--hidden 1024 --inner 512 --experts 32 --top-k 8 --layers 4] [--dtype bfloat16]

quality: for every target `compress learn-routing tiny-moe-routing` on the model, with all rules calibrated to the same activation on the
same text and measured on WikiText-2 test; runs that are complete under --out are not run again. --set changes the recipe. "smaller k" is
the mixture of the two nearest numbers of experts, chosen sequence by sequence, that has the activation of the learned routing on the
measured text: its mean log-likelihood and divergence lie on the line between those of the two. --fake-bits first rounds the experts to 2 and 3
bits in turn (2.5 bits on average) by GPTQ with compensation, and keeps them as dense weights.

speed: tokens a second on this CPU, reading a prompt and writing token by token, unpruned and with a given share of the experts, in one
run. The model has random weights of the given sizes, and its routers keep a random part of the slots; --routed measures exported folders
(`compress export RUN`) with and without their routing instead.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from compress.models import LoadedModel, load_model

CALIBRATION = "asset:wikipedia"


# --- quality


def fake_quantised(model: str, folder: Path) -> str:
    """A copy whose experts are rounded to 2 and 3 bits in turn, with dense weights. Returns its folder."""
    from compress.calibrate import walk_blocks
    from compress.data import TokenBlocks, tokenize
    from compress.quantize.gptq import quantize_matrix
    from compress.quantize.grid import Grid
    from compress.text import TextSource
    from compress.weights import find_weights

    if (folder / "config.json").exists():
        return str(folder)
    loaded = load_model(model, dtype="float32")
    refs = [ref for ref in find_weights(loaded.model) if ref.expert is not None]
    tokens = tokenize(TextSource(path=CALIBRATION), loaded.tokenizer)
    batches = TokenBlocks(tokens, 256, seed=0).batch(0, 128).split(8)
    grids = {2: Grid(2, 64, "float"), 3: Grid(3, 64, "float")}
    for block, stats in walk_blocks(loaded.model, refs, batches, gram=True):
        for ref in refs:
            if ref.layer == block.index and ref.expert is not None:
                rounded = quantize_matrix(ref.view(), stats[ref.name].gram, grids[2 + ref.expert % 2]).quantized.dequantize()
                with torch.no_grad():
                    ref.view().copy_(rounded)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def quality(arguments: argparse.Namespace) -> None:
    from compress.recipe_file import load_recipe_of, recipe_path
    from compress.recipe_routing import LearnRoutingRecipe
    from compress.routing.run import learn_routing

    model = fake_quantised(arguments.model, arguments.out / "fake-2.5-bit") if arguments.fake_bits else arguments.model
    tables = {}
    for target in arguments.targets:
        folder = arguments.out / f"{Path(model).name.removeprefix('asset:')}-{round(100 * target)}"
        overrides = [f"model.source={model}", f"target_activation={target}", *arguments.overrides]
        recipe = load_recipe_of(LearnRoutingRecipe, recipe_path("tiny-moe-routing"), overrides)
        if not (folder / "summary.json").exists():
            learn_routing(recipe, folder, resume=(folder / "recipe.yaml").exists(), resume_command="the same command")
        rows = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        tables[target] = compared(rows, next(iter(recipe.evaluate.texts)), recipe.method)
    print("| target | method | perplexity | against unpruned | KL | experts run |\n| ---: | --- | ---: | ---: | ---: | ---: |")
    for target, rows in tables.items():
        for row in rows:
            print(
                f"| {100 * target:.0f} % | {row['method']} | {row['perplexity']:.2f} | {100 * row['excess']:+.2f} % | {row['kl']:.4f} | "
                f"{100 * row['activation']:.1f} % |"
            )


def compared(rows: list[dict[str, Any]], text: str, method: str) -> list[dict[str, Any]]:
    """The rows of one target on one text, plain smaller k's made one mixture of the learned routing's activation."""
    plain = {row["method"]: row for row in rows}
    points = [
        (row["activation"][text], math.log(row["perplexities"][text]), row["kl"][text]) for row in rows if is_smaller_k(row)
    ]
    unpruned, own = plain["unpruned"], plain[method]
    base, share = unpruned["perplexities"][text], own["activation"][text]
    points.append((1.0, math.log(base), 0.0))
    points.sort()
    found = [
        {
            "method": row["method"],
            "perplexity": row["perplexities"][text],
            "kl": row["kl"][text],
            "activation": row["activation"][text],
        }
        for row in rows
        if not is_smaller_k(row)
    ]
    below = max((p for p in points if p[0] <= share + 1e-9), default=None)
    above = min((p for p in points if p[0] >= share - 1e-9), default=None)
    if below is not None and above is not None:
        part = (share - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
        nll, kl = (a + part * (b - a) for a, b in zip(below[1:], above[1:], strict=True))
        found.append({"method": "smaller k", "perplexity": math.exp(nll), "kl": kl, "activation": share})
    return [{**row, "excess": row["perplexity"] / base - 1} for row in found]


def is_smaller_k(row: dict[str, Any]) -> bool:
    return row["method"].startswith("top-") and row["method"] != "top-p"


# --- speed


def random_model(arguments: argparse.Namespace) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=4096,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 64),
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        max_position_embeddings=1024,
        eos_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).eval()


def random_routing(model: Any, share: float, ids: torch.Tensor) -> Any:
    """Routers that spread tokens over all candidates, calibrated to a share of the experts."""
    from compress.routing.calibrate import meet_target
    from compress.routing.decisions import make_decision
    from compress.routing.gate import attach
    from compress.routing.mixtures import observe
    from compress.routing.router import TopAnyRouter
    from compress.routing.storage import frozen

    mixtures, seen = observe(model, [ids])
    decisions = {}
    for number, mixture in enumerate(mixtures):
        router = make_decision("otp", mixture, seed=number)
        assert isinstance(router, TopAnyRouter)
        router.standardise(seen[mixture.name].hidden, seen[mixture.name].weights)
        with torch.no_grad():
            router.read.normal_(0, 1, generator=torch.Generator().manual_seed(number))
        decisions[mixture.name] = frozen(router)
    routing = attach(model, mixtures, decisions, "otp")
    meet_target(model, routing, [ids], share)
    return routing


@torch.no_grad()
def tokens_per_second(model: Any, ids: torch.Tensor, repeats: int, new: int) -> tuple[float, float]:
    """Median over repeats: prompt tokens a second, and new tokens a second at batch 1."""
    prefill, decode = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        out = model(ids, use_cache=True)
        prefill.append(ids.numel() / (time.perf_counter() - began))
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        began = time.perf_counter()
        for _ in range(new):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decode.append(new / (time.perf_counter() - began))
    return statistics.median(prefill), statistics.median(decode)


def speed(arguments: argparse.Namespace) -> None:
    print("| model | experts | experts run | prefill, tokens/s | decode, tokens/s |\n| --- | --- | ---: | ---: | ---: |")
    if arguments.routed:
        for folder in arguments.routed:
            loaded: LoadedModel = load_model(folder, dtype=arguments.dtype)
            routing = vars(loaded.model)["_compress_routing"]
            for dispatch in arguments.dispatch:
                loaded.model.set_experts_implementation(dispatch)
                print_speed(Path(folder).name, dispatch, loaded.model, arguments, [("unpruned", None), ("routed", routing)])
        return
    model = random_model(arguments)
    ids = torch.randint(1, 4096, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    routings: list[tuple[str, Any]] = [("unpruned", None)]
    for share in arguments.shares:
        routing = random_routing(model, share, ids)
        routing.detach()
        routings.append((f"{100 * share:.0f} %", routing))
    name = f"{arguments.layers} layers, {arguments.top_k} of {arguments.experts} experts of {arguments.hidden} x {arguments.inner}, {arguments.dtype}"
    for dispatch in arguments.dispatch:
        model.set_experts_implementation(dispatch)
        print_speed(name, dispatch, model, arguments, routings)


def print_speed(name: str, dispatch: str, model: Any, arguments: argparse.Namespace, routings: list[tuple[str, Any]]) -> None:
    """Rows of one model and dispatch, measured in turns so that a change of the machine's speed meets them all."""
    ids = torch.randint(1, model.config.vocab_size, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    attached = vars(model).get("_compress_routing")
    if attached is not None:
        attached.detach()
    found: dict[str, list[tuple[float, float]]] = {label: [] for label, _ in routings}
    for _ in range(arguments.rounds):
        for label, routing in routings:
            if routing is not None:
                routing.reattach()
            found[label].append(tokens_per_second(model, ids, 1, arguments.new))
            if routing is not None:
                routing.detach()
    for label, pairs in found.items():
        prefill, decode = (statistics.median(side) for side in zip(*pairs[1:], strict=True))  # the first round warms up
        print(f"| {name} | {dispatch} | {label} | {prefill:,.0f} | {decode:,.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("quality")
    one.add_argument("--model", default="asset:tiny-moe")
    one.add_argument("--fake-bits", action="store_true")
    one.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    one.add_argument("--out", type=Path, default=Path("runs/routing"))
    one.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    two = commands.add_parser("speed")
    two.add_argument("--routed", nargs="*", default=[])
    for name, value in (
        ("hidden", 1024),
        ("inner", 512),
        ("experts", 32),
        ("top-k", 8),
        ("layers", 4),
        ("prompt", 256),
        ("new", 32),
    ):
        two.add_argument(f"--{name}", type=int, default=value)
    two.add_argument("--rounds", type=int, default=6)
    two.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    two.add_argument("--dispatch", nargs="+", default=["eager", "grouped_mm"])
    two.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    {"quality": quality, "speed": speed}[arguments.command](arguments)


if __name__ == "__main__":
    main()
