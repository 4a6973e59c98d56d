"""Perplexity by the literature's exact protocol, and divergence from a reference model.

The protocol is that of GPTQ, SparseGPT, Wanda and MaskLLM: the whole text is tokenised at once and cut into non-overlapping
windows of `seqlen` tokens (what is left at the end is dropped), each window is scored on its own, and the perplexity is the
exponential of the mean negative log-likelihood of the `seqlen - 1` predicted tokens of all windows. Papers differ in `seqlen` and
in whether a BOS token stands in front, so a result states both.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from compress.assets import is_asset
from compress.errors import CompressError, UsageError
from compress.text import SUFFIXES, TextSource, find_text_files, iter_documents, read_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXT = "asset:wikitext2-test"
DEFAULT_SEQLEN = 2048
WIKITEXT = ("wikitext", "wikitext2")  # short for the hub's Salesforce/wikitext:wikitext-2-raw-v1:test:text
Bos = Literal["auto", "none", "every"]
Progress = Callable[[int, int, float], None]  # windows done, windows in all, perplexity so far

_CHUNK_ELEMENTS = 1 << 24  # logits turned to fp32 at once (64 MiB): 100 positions of a vocabulary of 150,000


@dataclass(frozen=True)
class EvalText:
    """A text to score: the string itself, what messages call it, and the sha256 of its UTF-8 bytes."""

    text: str
    label: str
    sha256: str

    @classmethod
    def of(cls, text: str, label: str = "text") -> EvalText:
        """Wrap a string."""
        return cls(text, label, hashlib.sha256(text.encode("utf-8")).hexdigest())


@dataclass(frozen=True)
class TokenScores:
    """Scores of windows of token ids; means are over predicted positions, in nats."""

    nll: float
    tokens: int
    window_nlls: list[float]
    kl: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return _exp(self.nll)


@dataclass
class Perplexity:
    """A perplexity and everything that is needed to reproduce it.

    tokens: predicted tokens, `windows * (seqlen - 1)`. bos: "none", "once" (at the start of the whole text, hence in the first
    window only) or "every window". dtype: of the model's weights. data_sha256: of the UTF-8 bytes of the text.
    tokens_per_second: tokens read (`windows * seqlen`) by wall time. kl: mean KL(reference || model) of a predicted position, in
    nats; top1_agreement: share of positions at which both find the same token most likely.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    bos: str
    dtype: str
    protocol: str
    data_sha256: str
    seconds: float
    tokens_per_second: float
    window_perplexities: list[float]
    kl: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values; `kl` and `top1_agreement` only when there was a reference."""
        fields = dict(vars(self))
        if self.kl is None:
            del fields["kl"], fields["top1_agreement"]
        return fields


def evaluation_text(data: str | None = None) -> EvalText:
    """The text that `--data` names, as the one string to score.

    None: the embedded WikiText-2 test. `asset:NAME`. A file: a text file is taken as it is; the records of a `.jsonl`, `.json`
    or `.parquet` file are joined by blank lines. `wikitext`: WikiText-2 raw test from the hub. Otherwise a hub dataset or a
    dataset folder as `dataset[:config[:split[:field]]]`, by default split `test` and field `text`; its rows are joined by
    blank lines, as in GPTQ. Raises UsageError when the text is missing, unreadable or empty.
    """
    data = DEFAULT_TEXT if data is None else data
    if is_asset(data):
        return _checked(read_plain(find_text_files(data)[0]), data)
    path = Path(data).expanduser()
    named = path.name.lower()
    if path.is_file():
        if named.endswith(tuple(suffix for suffix in SUFFIXES if suffix != ".txt")):
            return _checked("\n\n".join(iter_documents(TextSource(path=data))), data)
        return _checked(read_plain(path), data)
    if (data.startswith(("/", "./", "../", "~")) and not path.is_dir()) or named.endswith(SUFFIXES):
        raise UsageError(f"there is no file {data} (looked in {Path.cwd()})")
    source = _hub_source(data)
    return _checked("\n\n".join(iter_documents(source)), f"{source.label}:{source.field}")


def _hub_source(spec: str) -> TextSource:
    if spec in WIKITEXT:
        return TextSource(dataset="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test")
    parts = spec.split(":")
    if len(parts) > 4 or not parts[0]:
        raise UsageError(f"'{spec}' is no text; give a file, asset:NAME, wikitext, or dataset[:config[:split[:field]]]")
    dataset, config, split, field = (parts + [""] * 4)[:4]
    return TextSource(dataset=dataset, name=config or None, split=split or "test", field=field or "text")


def _checked(text: str, label: str) -> EvalText:
    if not text or text.isspace():
        raise UsageError(f"{label} holds no text")
    return EvalText.of(text, label)


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: EvalText | str,
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    bos: Bos = "auto",
    batch_size: int = 1,
    reference: nn.Module | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a text, by the protocol at the top of this module.

    seqlen: tokens in a window; None is 2048, or all positions of a model that has fewer.
    limit: score the first so many windows only.
    bos: "auto" tokenises as the tokenizer does by itself, which for some puts BOS in front of the whole text; "none" adds no
        special token; "every" makes each window BOS and `seqlen - 1` tokens of the text, all of which are predicted.
    batch_size: windows in a forward pass. reference: a model with the same vocabulary to compare with.
    progress: called after every batch.

    Raises UsageError for a text of less than one window, a `seqlen` beyond what the model has positions for, a tokenizer that
    is not the model's or has no BOS, and a reference with another vocabulary; CompressError when the model's output is not
    finite.
    """
    text = EvalText.of(text) if isinstance(text, str) else text
    if seqlen is None:
        seqlen = min(
            DEFAULT_SEQLEN, *(positions(scored) or DEFAULT_SEQLEN for scored in (model, reference) if scored is not None)
        )
    if seqlen < 2:
        raise UsageError(f"the sequence length is {seqlen}; it must be at least 2")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit} windows; it must be at least 1")
    for scored in (model, reference):
        if scored is not None:
            _check_length(scored, seqlen)
    windows, stated = token_windows(tokenizer, text, seqlen, bos)  # [windows, seqlen]
    windows = windows[:limit]
    _check_vocabulary(model, windows)
    began = time.perf_counter()
    with torch.inference_mode():
        scores = _score(model, windows, batch_size, reference, progress)
    seconds = time.perf_counter() - began
    return Perplexity(
        perplexity=scores.perplexity,
        tokens=scores.tokens,
        windows=len(windows),
        seqlen=seqlen,
        bos=stated,
        dtype=str(_floating_parameter(model).dtype).removeprefix("torch."),
        protocol=_protocol(seqlen, stated, len(windows)),
        data_sha256=text.sha256,
        seconds=seconds,
        tokens_per_second=windows.numel() / seconds,
        window_perplexities=[_exp(nll) for nll in scores.window_nlls],
        kl=scores.kl,
        top1_agreement=scores.top1_agreement,
    )


def evaluate_tokens(
    model: nn.Module,
    ids: Tensor,
    *,
    batch_size: int = 1,
    reference: nn.Module | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Score windows of token ids, int64 `[windows, seqlen]`: the small measure to take amid training.

    The model is put in evaluation mode and every module gets back the mode it had. Raises as `perplexity` does.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UsageError(f"token windows must be [windows, seqlen] with seqlen at least 2, not {list(ids.shape)}")
    _check_vocabulary(model, ids)
    # Not inference_mode: a tensor that a module keeps for later could then no longer take part in the next backward.
    with torch.no_grad():
        return _score(model, ids, batch_size, reference, progress)


def _protocol(seqlen: int, bos: str, windows: int) -> str:
    window = f"windows of {seqlen} tokens"
    if bos == "every window":
        window = f"windows of BOS and {seqlen - 1} tokens, BOS given and not predicted"
    begin = {"none": "no special token added", "once": "BOS once before the whole text"}.get(bos, "BOS in front of every window")
    return (
        f"gptq-windows: whole text tokenised at once, {begin}; the first {windows} non-overlapping {window}, the rest dropped; "
        f"exp of the mean NLL (fp32 log-softmax) of the {seqlen - 1} predicted tokens of each window"
    )


# --- from text to windows


def token_windows(tokenizer: PreTrainedTokenizerBase, text: EvalText, seqlen: int, bos: Bos) -> tuple[Tensor, str]:
    """All windows of a text, int64 `[windows, seqlen]`, and what is said about BOS: "none", "once" or "every window".

    Raises UsageError for a text of less than one window, and for bos "every" when the tokenizer has no BOS.
    """
    if bos == "auto":
        ids, stated, front = _ids(tokenizer, text.text, True), "once" if _adds_in_front(tokenizer) else "none", 0
    elif bos == "none":
        ids, stated, front = _ids(tokenizer, text.text, False), "none", 0
    elif bos == "every":
        if tokenizer.bos_token_id is None:
            raise UsageError("this tokenizer has no BOS token, so no window can begin with one; use bos 'auto' or 'none'")
        ids, stated, front = _ids(tokenizer, text.text, False), "every window", 1
    else:
        raise UsageError(f"bos is '{bos}'; it must be auto, none or every")
    length = seqlen - front
    count = len(ids) // length
    if count == 0:
        raise UsageError(
            f"{text.label} has {len(ids):,} tokens and one window needs {length:,}; "
            "give a longer text or a smaller sequence length"
        )
    windows = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    if front:
        windows = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], dim=1)
    return windows, stated


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    # verbose=False: no warning that the text is longer than the model, which is what windows are for
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _adds_in_front(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts something before a text by itself; an EOS that it may put behind is no concern here."""
    with_special, without = _ids(tokenizer, "a", True), _ids(tokenizer, "a", False)
    return with_special[: len(without)] != without


# --- scoring


def _score(
    model: nn.Module, windows: Tensor, batch_size: int, reference: nn.Module | None, progress: Progress | None
) -> TokenScores:
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
    count, predicted = windows.shape[0], windows.shape[1] - 1
    window_nlls: list[float] = []
    kl = agreeing = 0.0
    with _eval_mode(model), _eval_mode(reference):
        for start in range(0, count, batch_size):
            batch = windows[start : start + batch_size]
            logits = _logits(model, batch)  # [batch, seqlen, vocabulary], in the model's dtype
            other = None if reference is None else _logits(reference, batch)
            if other is not None and other.shape[-1] != logits.shape[-1]:
                raise UsageError(
                    f"the model has a vocabulary of {logits.shape[-1]:,} and the reference one of {other.shape[-1]:,}; "
                    "they can only be compared over the same vocabulary"
                )
            for row, ids in enumerate(batch):
                # One window at a time: logits[row, :-1] is a view, where flattening the batch would copy it.
                sums = _window_sums(logits[row, :-1], ids[1:], None if other is None else other[row, :-1])
                if not all(map(math.isfinite, sums)):
                    what = "divergence from the reference" if math.isfinite(sums[0]) else "output of the model"
                    raise CompressError(
                        f"the {what} is not finite (NaN or infinity) in window {start + row}; "
                        "weights are damaged, or the dtype overflows: try float32"
                    )
                window_nlls.append(sums[0] / predicted)
                kl += sums[1]
                agreeing += sums[2]
            del logits, other  # or they would live beside the next batch's
            if progress is not None:
                progress(len(window_nlls), count, _exp(math.fsum(window_nlls) / len(window_nlls)))
    tokens = count * predicted
    nll = math.fsum(window_nlls) / count
    if reference is None:
        return TokenScores(nll, tokens, window_nlls)
    return TokenScores(nll, tokens, window_nlls, kl / tokens, agreeing / tokens)


def _window_sums(logits: Tensor, target: Tensor, reference: Tensor | None) -> tuple[float, float, float]:
    """Sums over the positions of one window: NLL, KL(reference || model), equal argmax. logits `[positions, vocabulary]`."""
    target = target.to(logits.device)
    nll = kl = torch.zeros((), dtype=torch.float64, device=logits.device)
    agreeing = torch.zeros((), dtype=torch.int64, device=logits.device)
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        log_q = logits[part].float().log_softmax(-1)
        nll = nll - log_q.gather(-1, target[part, None]).double().sum()
        if reference is not None:
            log_p = reference[part].to(logits.device).float().log_softmax(-1)
            # where p is 0 the term is 0, also where log q is -inf (a token that a model has masked out)
            terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
            kl = kl + terms.sum(-1).double().sum()
            agreeing = agreeing + (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return nll.item(), kl.item(), agreeing.item()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(_input_device(model)), use_cache=False).logits


def _input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the input embedding, which a model spread over devices need not share."""
    return _embedding(model).weight.device


def _embedding(model: Any) -> nn.Embedding:
    return model.get_input_embeddings()


def _floating_parameter(model: nn.Module) -> Tensor:
    """The first floating-point parameter; a quantised checkpoint also has integer ones."""
    return next((p for p in model.parameters() if p.is_floating_point()), _embedding(model).weight)


def positions(model: nn.Module) -> int | None:
    """The longest sequence the configuration allows, None where it states no bound."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_length(model: nn.Module, seqlen: int) -> None:
    limit = positions(model)
    if limit is not None and seqlen > limit:
        raise UsageError(
            f"windows of {seqlen:,} tokens are longer than the {limit:,} positions of this model; use --seqlen {limit}"
        )


def _check_vocabulary(model: nn.Module, windows: Tensor) -> None:
    rows = _embedding(model).num_embeddings
    highest = int(windows.max())
    if highest >= rows:
        raise UsageError(
            f"the text has the token id {highest:,}, but the model knows {rows:,} tokens; the tokenizer is not the model's"
        )


@contextlib.contextmanager
def _eval_mode(model: nn.Module | None) -> Iterator[None]:
    """Evaluation mode, and afterwards for every module the mode it had: a frozen part may have been in evaluation mode before."""
    training = [] if model is None else [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _exp(nll: float) -> float:
    """`exp`, infinite instead of an OverflowError for a model that is this bad."""
    return math.exp(nll) if nll < 709 else math.inf
