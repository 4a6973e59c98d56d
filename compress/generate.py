"""Continue a text with a model, and say how fast: the prompt (prefill) and the tokens after it (decode) apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from compress.errors import UsageError
from compress.models import LoadedModel


@dataclass(frozen=True)
class Generation:
    """What was generated. `prefill_seconds`: from the prompt to the first new token; `decode_seconds`: from the first to the last.

    stopped: "end" when the model gave its end-of-text token (counted in `new_tokens`), "length" otherwise.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    stopped: str

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second after the first one, or None when there is no second one."""
        return (self.new_tokens - 1) / max(self.decode_seconds, 1e-9) if self.new_tokens > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, the rates among them."""
        rates = {"prefill_tokens_per_second": self.prefill_rate, "decode_tokens_per_second": self.decode_rate}
        return asdict(self) | rates


def generate(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop: bool = True,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue `prompt`, token by token, and hand the text to `on_text` in pieces as whole words are known.

    temperature 0 takes the most likely token every time; above 0 tokens are drawn from the whole distribution, softmax(logits /
    temperature), after `torch.manual_seed(seed)`. The repetition penalties and the like of the model's generation_config.json are not
    used. Stops at the model's end-of-text token (unless `stop` is off), after `max_new_tokens`, or at the last position of the model.
    Raises UsageError when the prompt has no tokens or leaves no position free.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        if tokenizer.bos_token_id is None:
            raise UsageError("the prompt is empty, and this tokenizer has no token to start a text with; give some text")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    length = ids.shape[1]
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    room = max_new_tokens if positions is None else min(max_new_tokens, positions - length)
    if room < 1:
        raise UsageError(f"the prompt has {length} tokens, and the model has {positions} positions: nothing is left to generate")
    ends = _end_tokens(loaded) if stop else []
    settings = GenerationConfig(
        max_new_tokens=room,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else None,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
    )
    streamer = _Clock(tokenizer, on_text)
    torch.manual_seed(seed)
    with torch.inference_mode():
        generator: Any = model  # `generate` comes from a mixin that type-checkers do not see
        ids = ids.to(model.device)
        with _no_ends_of_its_own(generator.generation_config):
            result = generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer)
    new = result[0, length:].tolist()
    start, first, *_ = streamer.times
    stopped = "end" if new and new[-1] in ends else "length"
    return Generation("".join(streamer.pieces), length, len(new), first - start, streamer.times[-1] - first, stopped)


@contextmanager
def _no_ends_of_its_own(config: GenerationConfig | None) -> Iterator[None]:
    """Within it a model's generation config knows no end: transformers takes from there what it is not given, also the end that is not wanted."""
    known = None if config is None else config.eos_token_id
    if config is not None:
        config.eos_token_id = None
    try:
        yield
    finally:
        if config is not None:
            config.eos_token_id = known


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """The tokens that end a text: those of the model's generation config, else the tokenizer's."""
    config = loaded.model.generation_config
    ends = config.eos_token_id if config is not None and config.eos_token_id is not None else loaded.tokenizer.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


class _Clock(TextStreamer):
    """Notes when each token came, and passes the text on. transformers calls `put` with the prompt first, before it is read."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.times: list[float] = []
        self.pieces: list[str] = []
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            self._on_text(text)
