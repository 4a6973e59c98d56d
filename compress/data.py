"""Text becomes training data: documents -> one array of token ids -> fixed-length blocks that any step can be asked for.

Both steps are pure functions of their arguments: nothing is kept between calls, so a run that is killed and started again, or
that runs on another number of processes, sees the same blocks.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import UsageError
from compress.text import TextSource, iter_documents, read_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextSource", "TokenBlocks", "iter_documents", "read_text", "tokenize"]

log = logging.getLogger(__name__)

IntArray = np.ndarray[Any, np.dtype[np.int32]]

_CHUNK = 1 << 18  # characters: a longer document is tokenised in chunks of at most this, which bounds the time and the memory
_BATCH = 1 << 20  # characters handed to the tokenizer at once
_PIECE = 4096  # tokens: sources are mixed in pieces of this length, long enough to leave the text of most blocks connected


def tokenize(
    sources: TextSource | Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> IntArray:
    """Token ids of all sources: int32 `[tokens]`, at most `max_tokens`.

    Every document is followed by the EOS token, when the tokenizer has one; no other special token is added, so a block may
    begin anywhere in a document, as in pre-training. Blank documents are left out. A document of more than 262,144 characters
    is tokenised in chunks cut at a paragraph (else at a line, a space), which can change a token at each cut: fine for
    training and calibration, and not used for evaluation.

    Several sources are mixed in pieces of 4,096 tokens in proportion to their weights: the next piece is taken from the source
    that lags most behind its share (the earlier one on a tie). A source that ends leaves the rest to the others; nothing is
    read twice. Raises UsageError for whatever is wrong with a source (see `iter_documents`), and for an unbounded stream.
    """
    listed = [sources] if isinstance(sources, TextSource) else list(sources)
    if not listed:
        raise UsageError("no text source is given")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; it must be at least 1")
    for source in listed:
        if source.endless and max_tokens is None:
            raise UsageError(f"{source.label} is streamed without end; give `documents:` or a number of tokens")
    mixed: list[IntArray] = []
    streams = [_pieces(_token_stream(source, tokenizer)) for source in listed]
    counts, total, live = [0] * len(listed), 0, list(range(len(listed)))
    while live and (max_tokens is None or total < max_tokens):
        chosen = min(live, key=lambda i: (counts[i] / listed[i].weight, i))
        piece = next(streams[chosen], None)
        if piece is None:
            live.remove(chosen)
            if live and max_tokens is not None:
                log.warning(
                    "%s ended after %s tokens; the other sources supply the rest", listed[chosen].label, f"{counts[chosen]:,}"
                )
            continue
        if max_tokens is not None:
            piece = piece[: max_tokens - total]
        mixed.append(piece)
        counts[chosen] += len(piece)
        total += len(piece)
    return np.concatenate(mixed)


def _token_stream(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[IntArray]:
    """The ids of a source in arrays of any length; each batch of chunks is tokenised in one call, which fast tokenizers run
    on all cores."""
    eos = tokenizer.eos_token_id
    texts: list[str] = []
    ends: list[bool] = []
    size = 0

    def flush() -> IntArray:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        parts = [
            np.asarray([*row, eos] if end and eos is not None else row, dtype=np.int32)
            for row, end in zip(ids, ends, strict=True)
        ]
        return np.concatenate(parts)

    for document in iter_documents(source):
        if not document or document.isspace():
            continue
        chunks = list(_chunks(document))
        for index, chunk in enumerate(chunks):
            texts.append(chunk)
            ends.append(index == len(chunks) - 1)
            size += len(chunk)
            if size >= _BATCH:
                yield flush()
                texts, ends, size = [], [], 0
    if texts:
        yield flush()


def _chunks(text: str) -> Iterator[str]:
    """Cut a long text behind a blank line, else behind a line feed, else before a space, else anywhere; joined it is the text."""
    start = 0
    while len(text) - start > _CHUNK:
        end = start + _CHUNK
        for mark, behind in (("\n\n", 2), ("\n", 1), (" ", 0)):
            found = text.rfind(mark, start + 1, end)
            if found > 0:
                end = found + behind
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _pieces(arrays: Iterable[IntArray]) -> Iterator[IntArray]:
    """Re-cut a stream of arrays into pieces of `_PIECE` tokens; the last one may be shorter."""
    rest = np.empty(0, dtype=np.int32)
    for array in arrays:
        rest = np.concatenate([rest, array])
        whole = len(rest) // _PIECE * _PIECE
        for start in range(0, whole, _PIECE):
            yield rest[start : start + _PIECE]
        rest = rest[whole:]
    if len(rest):
        yield rest


class TokenBlocks:
    """Fixed-length blocks of a token array, in an order that depends on the seed alone.

    Sample number `n` belongs to epoch `n // len(self)`. In each epoch the array is cut into `len(self)` blocks that do not
    overlap, taken in a random order. The first epoch cuts from the first token on; each later one begins at a random token and
    goes round the end of the array, so that it cuts the text elsewhere (then one block runs from the end into the beginning).
    Less than a block (`tokens % seqlen`) is left out of an epoch.

    Order and offset come from the raw numbers of the counter-based generator Philox keyed by (seed, epoch), whose stream NumPy
    guarantees for all versions.

    tokens: integers `[tokens]`; seqlen: tokens in a block, at least 2; seed: 0 <= seed < 2^64.
    Raises UsageError when there is not enough text for one block.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], seqlen: int, seed: int) -> None:
        if seqlen < 2:
            raise UsageError(f"the sequence length is {seqlen}; it must be at least 2 (one token to predict the other from)")
        if not 0 <= seed < 1 << 64:
            raise UsageError(f"the seed is {seed}; it must lie in [0, 2^64)")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be a one-dimensional integer array, not {tokens.dtype} of shape {tokens.shape}")
        if len(tokens) < seqlen:
            raise UsageError(
                f"the text has {len(tokens):,} tokens and one block needs {seqlen:,}; give more text or a shorter sequence length"
            )
        self.tokens: IntArray = np.ascontiguousarray(tokens, dtype=np.int32)
        self.seqlen = seqlen
        self.seed = seed
        self.blocks = len(tokens) // seqlen
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may reach into the next epoch

    def __len__(self) -> int:
        """Blocks in an epoch."""
        return self.blocks

    def batch(self, step: int, size: int) -> Tensor:
        """The `size` blocks of step `step` (from 0): int64 `[size, seqlen]`, samples `step * size` to `(step + 1) * size - 1`."""
        import torch

        if step < 0 or size < 1:
            raise ValueError(f"step must be at least 0 and size at least 1, not {step} and {size}")
        rows = np.stack([self._sample(number) for number in range(step * size, (step + 1) * size)])
        return torch.from_numpy(rows.astype(np.int64))

    def epochs(self, step: int, size: int) -> float:
        """How many epochs have been read before step `step` at `size` blocks a step."""
        return step * size / self.blocks

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the tokens, the block length and the seed: what decides every batch."""
        digest = hashlib.sha256(f"token-blocks 1 seqlen {self.seqlen} seed {self.seed} tokens {len(self.tokens)}\n".encode())
        digest.update(self.tokens.astype("<i4", copy=False).data)
        return digest.hexdigest()

    def _sample(self, number: int) -> IntArray:
        epoch, place = divmod(number, self.blocks)
        order, offset = self._epoch(epoch)
        start = (offset + int(order[place]) * self.seqlen) % len(self.tokens)
        block = self.tokens[start : start + self.seqlen]
        if len(block) < self.seqlen:
            block = np.concatenate([block, self.tokens[: self.seqlen - len(block)]])
        return block

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """The order of the blocks, int64 `[blocks]`, and the token at which the first one begins."""
        bits = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        raw = bits.random_raw(self.blocks + 1)
        order = np.argsort(raw[1:], kind="stable")
        return order, int(raw[0] % len(self.tokens)) if epoch else 0
