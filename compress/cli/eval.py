"""`compress eval`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or asset:tiny-llama.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Text file (taken as it is), asset:NAME, `wikitext`, or DATASET[:CONFIG[:SPLIT[:FIELD]]]. Default: WikiText-2 test, embedded.",
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens a window. Default: 2048, or all positions of a model with fewer.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Score the first so many windows only.")] = None,
    bos: Annotated[
        Literal["auto", "none", "every"],
        typer.Option("--bos", help="auto: what the tokenizer puts before the whole text; none; every: before every window."),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "fastest", "float32", "bfloat16", "float16"],
        typer.Option(
            "--dtype",
            help="Load the weights as this: auto is the checkpoint's own, fastest what this machine multiplies fastest.",
        ),
    ] = "auto",
    reference: Annotated[
        str | None, typer.Option("--reference", help="Another model: adds mean KL from it and top-1 agreement with it.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows a forward pass.")] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the hub.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity by the literature's protocol (GPTQ, SparseGPT, Wanda).

    The text is tokenised whole and cut into windows that do not overlap; the perplexity is the exponential of the mean negative
    log-likelihood over the predicted tokens.

    **Examples**

    - `compress eval asset:tiny-llama`
    - `compress eval models/smollm2-135m --seqlen 2048 --limit 8 --dtype float32 --bos none`
    - `compress eval my-sparse-model --reference meta-llama/Llama-3.2-1B --data wikitext --json`
    """
    from compress import console
    from compress.device import tell_slow
    from compress.evaluate import evaluation_text, perplexity
    from compress.models import load_model

    text = evaluation_text(data)
    with console.log.status(f"loading {model}"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        other = load_model(reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code) if reference else None
    tell_slow(loaded.model)
    with console.task("perplexity", limit or 1) as bar:
        found = perplexity(
            loaded.model,
            loaded.tokenizer,
            text,
            seqlen=seqlen,
            limit=limit,
            bos=bos,
            batch_size=batch_size,
            reference=other.model if other else None,
            progress=lambda done, total, value: bar.update(done, f"{value:.3f}", total),
        )
    if json_:
        typer.echo(
            json.dumps({"model": model, "data": text.label, **found.to_json(), **({"reference": reference} if reference else {})})
        )
        return
    from rich.table import Table

    from compress.cli.tables import stdout

    table = Table("measure", "value", show_header=False)
    table.add_row("perplexity", f"[bold]{found.perplexity:.4f}[/]")
    if found.kl is not None and found.top1_agreement is not None:
        table.add_row("KL from the reference", f"{found.kl:.5f} nats a token")
        table.add_row("top-1 agreement", f"{100 * found.top1_agreement:.2f} %")
    table.add_row("text", f"{text.label} (sha256 {found.data_sha256[:12]})")
    table.add_row("windows", f"{found.windows} of {found.seqlen} tokens, {found.tokens:,} predicted")
    table.add_row("BOS", found.bos)
    table.add_row("dtype", found.dtype)
    table.add_row("speed", f"{found.tokens_per_second:,.0f} tokens a second")
    stdout().print(table)
