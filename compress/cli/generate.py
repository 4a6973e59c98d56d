"""`compress generate`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer


def generate(
    model: Annotated[str, typer.Argument(help="Folder (packed or dense), hub name, .gguf file, or asset:tiny-llama.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="0: the most likely token every time. Above: draw from the distribution."),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws, with a temperature.")] = 0,
    dtype: Annotated[
        Literal["auto", "fastest", "float32", "bfloat16", "float16"],
        typer.Option(
            "--dtype",
            help="Type of activations and dense weights: auto is the checkpoint's own, fastest what this "
            "machine multiplies fastest. Packed values keep theirs.",
        ),
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the hub.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of the text as it comes.")
    ] = False,
) -> None:
    """Continue a text, and measure how fast the model does it.

    The text goes to stdout as it comes, the tokens a second to stderr: for the prompt (prefill) and for the tokens after it (decode) apart.

    **Examples**

    - `compress generate asset:tiny-llama --prompt "The history of"`
    - `compress generate my-packed-model --prompt "Once upon a time" --dtype bfloat16`
    - `compress generate my-sparse-model -p "Once" -n 64 --temperature 0.8 --seed 1 --json`
    """
    from compress import console
    from compress.device import tell_slow
    from compress.generate import generate as continue_text
    from compress.models import load_model

    with console.log.status(f"loading {model}"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tell_slow(loaded.model, head=False)
    show = (lambda text: None) if json_ else (lambda text: print(text, end="", flush=True))
    made = continue_text(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, on_text=show)
    kind = str(loaded.model.dtype).removeprefix("torch.")
    if json_:
        typer.echo(json.dumps({"model": model, "prompt": prompt, "dtype": kind, **made.to_json()}))
    else:
        typer.echo()
    rates = [f"prefill {made.prompt_tokens} tokens at {made.prefill_rate:,.1f} tokens a second"]
    if made.decode_rate is not None:
        rates.append(f"decode {made.new_tokens - 1} tokens at {made.decode_rate:,.1f} tokens a second")
    ended = "the model ended the text" if made.stopped == "end" else f"stopped after {made.new_tokens} new tokens"
    console.log.print(f"{'; '.join(rates)}; {ended} ({kind})", soft_wrap=True)
