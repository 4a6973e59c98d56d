"""Measuring perplexity on the texts of a recipe, with a progress bar: what sessions of all kinds share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compress import console
from compress.data import TextSource
from compress.evaluate import EvalText, Perplexity, perplexity
from compress.models import LoadedModel
from compress.recipe import SourceSection, TextSection
from compress.text import read_text

WINDOW_TOKENS = 2048  # tokens a forward pass when measuring: short windows are taken several at once


def text_source(section: SourceSection) -> TextSource:
    """The recipe's description of a text as what `compress.data` reads."""
    return TextSource(**section.model_dump())


def eval_texts(texts: Mapping[str, TextSection]) -> dict[str, EvalText]:
    """The texts to measure on, read: a text file as it is (or its span), records joined by blank lines."""
    found = {}
    for name, section in texts.items():
        source = text_source(section.source)
        found[name] = EvalText.of("\n\n".join(read_text(source)), source.label)
    return found


def measure_text(
    name: str,
    label: str,
    model: nn.Module,
    loaded: LoadedModel,
    text: EvalText,
    wanted: TextSection,
    reference: nn.Module | None = None,
) -> Perplexity:
    """Perplexity of `model` on one text with the tokenizer of `loaded`; `name` and `label` are shown: what is measured, and on which text."""
    with console.task(f"{name}: {label}", wanted.limit or 1) as bar:
        return perplexity(
            model,
            loaded.tokenizer,
            text,
            seqlen=wanted.seqlen,
            limit=wanted.limit,
            bos=wanted.bos,
            batch_size=max(1, WINDOW_TOKENS // wanted.seqlen),
            reference=reference,
            progress=lambda done, total, value: bar.update(done, f"perplexity {value:.2f}", total),
        )
