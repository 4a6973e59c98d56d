"""Time whole models: reading a prompt (prefill) and generating after it (decode), each model and type in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from compress.assets import asset_path
from compress.bench import threads_of_torch
from compress.decode import fuse, unfuse
from compress.errors import UsageError
from compress.generate import generate
from compress.models import LoadedModel, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelTiming:
    """One model in one type of activations; medians over the turns. backend: how the weights lie in memory, and with "control" that a dense model
    decoded by the code that packed models are decoded by (`compress.decode`). `weight_bytes`: parameters and buffers in memory.

    `speedup_prefill` and `speedup_decode` are relative to the first row of the run.
    """

    model: str
    backend: str
    dtype: str
    threads: int
    weight_bytes: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    speedup_prefill: float
    speedup_decode: float


def model_timings(
    sources: Sequence[str],
    dtypes: Sequence[str],
    *,
    threads: int,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    turns: int = 3,
    device: str = "auto",
) -> list[ModelTiming]:
    """Greedy generation after a prompt of WikiText-2, `turns` times, the models taking turns so that a change of the machine's speed
    meets all of them. A dense bfloat16 model is timed twice where it can be: as transformers decodes it, and by the code for packed models,
    which tells what sparsity gains from what that code does. Raises UsageError when a model has no room for prompt and new tokens, and what loading
    raises.
    """
    text = asset_path("wikitext2-test").read_text(encoding="utf-8")
    loaded: list[tuple[str, LoadedModel, str, bool]] = []
    for source in sources:
        for dtype in dtypes:
            model = load_model(source, dtype=dtype, device=device)
            ids = model.tokenizer(text[: 16 * prompt_tokens], verbose=False)["input_ids"][:prompt_tokens]
            prompt = str(model.tokenizer.decode(ids))
            loaded.append((source, model, prompt, False))
            if fuse(model.model, control=True):
                loaded.append((source, model, prompt, True))
                unfuse(model.model)
    runs: list[list[tuple[float, float]]] = [[] for _ in loaded]
    counts: list[tuple[int, int]] = [(0, 0)] * len(loaded)
    with threads_of_torch(threads):
        for turn in range(turns + 1):
            for i, (source, model, prompt, control) in enumerate(loaded):
                # An end of the text would cut some models' turns short: every turn decodes the same number of tokens.
                with _controlled(model.model, control):
                    made = generate(model, prompt, max_new_tokens=new_tokens, stop=False)
                if made.decode_rate is None or made.new_tokens < new_tokens:
                    raise UsageError(f"{source} has no room for {prompt_tokens} and {new_tokens} tokens; ask for fewer")
                if turn:  # the first one warms up
                    runs[i].append((made.prefill_rate, made.decode_rate))
                counts[i] = (made.prompt_tokens, made.new_tokens)
    rows: list[ModelTiming] = []
    for (source, model, _, control), rates, (prompt_count, new_count) in zip(loaded, runs, counts, strict=True):
        prefill, decode = (statistics.median(column) for column in zip(*rates, strict=True))
        first = rows[0] if rows else None
        rows.append(
            ModelTiming(
                model=source,
                backend=backend_of(model.model) + (", control" if control else ""),
                dtype=str(model.model.dtype).removeprefix("torch."),
                threads=threads,
                weight_bytes=bytes_in_memory(model.model),
                prompt_tokens=prompt_count,
                new_tokens=new_count,
                prefill_tokens_per_second=prefill,
                decode_tokens_per_second=decode,
                speedup_prefill=prefill / first.prefill_tokens_per_second if first else 1.0,
                speedup_decode=decode / first.decode_tokens_per_second if first else 1.0,
            )
        )
    return rows


@contextmanager
def _controlled(model: PreTrainedModel, control: bool) -> Iterator[None]:
    """Within it a dense model decodes as packed ones do, if `control`."""
    if control:
        fuse(model, control=True)
    try:
        yield
    finally:
        if control:
            unfuse(model)


def backend_of(model: nn.Module) -> str:
    """How the weights lie in memory: "dense", "2:4" and the type of the values (with that of the head, where it is int8), or "low-bit" and the
    widths."""
    from compress.runtime import Sparse24Linear
    from compress.runtime_lowbit import widths_of
    from compress.runtime_tables import Int8Head

    if widths := widths_of(model):
        return f"low-bit {', '.join(map(str, widths))}"
    packed = [m for m in model.modules() if isinstance(m, Sparse24Linear)]
    if not packed:
        return "dense"
    head = ", head int8" if any(isinstance(m, Int8Head) for m in model.modules()) else ""
    return f"2:4 {str(packed[0].values.dtype).removeprefix('torch.')}{head}"


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(seen.values())
