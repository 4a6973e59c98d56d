"""From documents to token ids, and from those to blocks that any step can ask for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import DOCUMENTS, prose, tiny_tokenizer, write_records

import compress.data
from compress.data import TextSource, TokenBlocks, tokenize
from compress.errors import UsageError

# --- tokenize


def test_each_document_is_followed_by_eos_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    tok = tiny_tokenizer(adds_bos=True)
    path = str(write_records(tmp_path, "a.jsonl"))
    expected: list[int] = []
    for document in DOCUMENTS:
        if document:
            expected += [*tok(document, add_special_tokens=False)["input_ids"], tok.eos_token_id]
    found = tokenize(TextSource(path=path), tok)
    assert found.dtype == np.int32
    assert found.tolist() == expected
    assert tokenize([TextSource(path=path)], tok, max_tokens=7).tolist() == expected[:7]


def test_without_eos_documents_stand_side_by_side(tmp_path: Path) -> None:
    tok = tiny_tokenizer(eos=False)
    ids = tokenize(TextSource(path=str(write_records(tmp_path, "a.jsonl"))), tok)
    assert tok.decode(ids) == "".join(DOCUMENTS)


@given(
    st.lists(st.sampled_from(["word", " ", "\n", "\n\n", "x" * 30]), max_size=40).map("".join),
    st.integers(2, 50),
)
def test_chunks_join_to_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress.data, "_CHUNK", size)
        chunks = list(compress.data._chunks(text))
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= size + 1 for chunk in chunks) or not text


def test_a_long_document_is_cut_at_paragraphs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(2000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tok, source = tiny_tokenizer(), TextSource(path=str(tmp_path / "a.txt"))
    monkeypatch.setattr(compress.data, "_CHUNK", 1000)
    monkeypatch.setattr(compress.data, "_BATCH", 2500)
    assert all(chunk.endswith("\n\n") for chunk in list(compress.data._chunks(text))[:-1])
    ids = tokenize(source, tok)
    assert ids[-1] == tok.eos_token_id
    assert (ids == tok.eos_token_id).sum() == 1
    assert tok.decode(ids[:-1]) == text


def sources_of(folder: Path, **words: int) -> dict[str, TextSource]:
    """Plain files in which every token tells its file: `a` writes only a's."""
    found = {}
    for name, count in words.items():
        (folder / f"{name}.txt").write_text(name * count)
        found[name] = TextSource(path=str(folder / f"{name}.txt"))
    return found


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(map(ord, text)) for text in texts]}


def mix(sources: list[TextSource], limit: int | None = None) -> str:
    return "".join(map(chr, tokenize(sources, Letters(), limit)))


def test_sources_mix_in_proportion_to_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress.data, "_PIECE", 10)
    a, b, c = sources_of(tmp_path, a=4000, b=4000, c=4000).values()
    weighted = [TextSource(path=a.path, weight=3), TextSource(path=b.path, weight=1), TextSource(path=c.path, weight=0.5)]
    found = mix(weighted, 3600)
    assert len(found) == 3600
    for end in range(45, 3600, 45):  # in proportion all along, not only at the end, to a piece
        for letter, share in zip("abc", (3 / 4.5, 1 / 4.5, 0.5 / 4.5), strict=True):
            assert abs(found[:end].count(letter) - share * end) <= 2 * 10
    assert found == mix(weighted, 3600)
    assert found.startswith(mix(weighted, 1234))


def test_a_source_that_ends_leaves_the_rest_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compress.data, "_PIECE", 10)
    a, b = sources_of(tmp_path, a=25, b=200).values()
    with caplog.at_level(logging.WARNING):
        assert sorted(mix([a, b])) == sorted("a" * 25 + "b" * 200)
        assert not caplog.records
        found = mix([a, b], 100)
    assert (found.count("a"), found.count("b")) == (25, 75)
    assert "a.txt ended after 25 tokens" in caplog.text


def test_tokenize_refuses_what_has_no_end_or_nothing() -> None:
    tok = tiny_tokenizer()
    with pytest.raises(UsageError, match="streamed without end"):
        tokenize(TextSource(dataset="some/where", streaming=True), tok)
    with pytest.raises(UsageError, match="no text source"):
        tokenize([], tok)
    with pytest.raises(UsageError, match="at least 1"):
        tokenize(TextSource(path="asset:wikipedia"), tok, 0)


# --- blocks

shapes = st.integers(2, 12).flatmap(lambda seqlen: st.tuples(st.just(seqlen), st.integers(seqlen, 20 * seqlen)))
seeds = st.integers(0, (1 << 64) - 1)


@given(shapes, seeds, st.integers(0, 4))
def test_an_epoch_covers_the_text_once(shape: tuple[int, int], seed: int, epoch: int) -> None:
    """With tokens that are their own positions a block tells where it was cut."""
    seqlen, count = shape
    blocks = TokenBlocks(np.arange(count), seqlen, seed)
    assert len(blocks) == count // seqlen
    found = torch.cat([blocks.batch(epoch * len(blocks) + i, 1) for i in range(len(blocks))])
    steps = (found[:, 1:] - found[:, :-1]) % count
    assert bool((steps == 1).all())  # each block is a run of the text, at most going round its end
    assert len(set(found.flatten().tolist())) == found.numel() == count - count % seqlen
    if epoch == 0:
        assert set(found[:, 0].tolist()) == set(range(0, count - seqlen + 1, seqlen))


@given(shapes, seeds, st.integers(0, 30), st.integers(1, 9))
def test_a_batch_is_addressed_by_sample_number(shape: tuple[int, int], seed: int, step: int, size: int) -> None:
    seqlen, count = shape
    tokens = np.arange(count, dtype=np.uint16)
    batch = TokenBlocks(tokens, seqlen, seed).batch(step, size)
    assert batch.dtype == torch.int64
    assert batch.shape == (size, seqlen)
    one_by_one = TokenBlocks(tokens, seqlen, seed)
    backwards = [one_by_one.batch(step * size + i, 1)[0] for i in reversed(range(size))]
    assert torch.equal(batch, torch.stack(backwards[::-1]))


def test_epochs_and_seeds_differ_in_order_and_later_epochs_cut_elsewhere() -> None:
    blocks = TokenBlocks(np.arange(10_000), 16, 7)
    first, second = (blocks.batch(epoch, len(blocks)) for epoch in range(2))
    assert not torch.equal(first, second)
    starts = [(blocks.batch(epoch, len(blocks))[:, 0] % 16).mode().values.item() for epoch in range(1, 9)]
    assert len(set(starts)) > 3
    assert not torch.equal(first, TokenBlocks(np.arange(10_000), 16, 8).batch(0, len(blocks)))


def philox(key: tuple[int, int], count: int) -> list[int]:
    """The first numbers of Philox4x64-10 (Salmon et al. 2011) from counter 1 on, in plain integers."""
    low, counter = (1 << 64) - 1, 1
    numbers: list[int] = []
    while len(numbers) < count:
        c, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            x, y = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(y >> 64) ^ c[1] ^ k0, y & low, (x >> 64) ^ c[3] ^ k1, x & low]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & low, (k1 + 0xBB67AE8584CAA73B) & low
        numbers += c
        counter += 1
    return numbers[:count]


@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_order_and_offset_are_those_of_the_generator(seed: int, epoch: int) -> None:
    """They must stay the same in every version, or a resumed run sees other text."""
    raw = philox((seed, epoch), 11)
    offset = raw[0] % 43 if epoch else 0
    order = sorted(range(10), key=lambda block: raw[1 + block])
    found = TokenBlocks(np.arange(43), 4, seed).batch(epoch, 10)
    assert found[:, 0].tolist() == [(offset + 4 * block) % 43 for block in order]


def test_one_order_as_it_was_first_released() -> None:
    blocks = TokenBlocks(np.arange(40), 4, 1)
    assert blocks.batch(0, 10)[:, 0].tolist() == [8, 16, 4, 32, 24, 36, 28, 20, 0, 12]
    assert blocks.batch(1, 10)[:, 0].tolist() == [1, 25, 21, 13, 17, 37, 29, 33, 9, 5]


def test_the_fingerprint_is_of_tokens_length_and_seed() -> None:
    tokens = np.arange(100)
    base = TokenBlocks(tokens, 8, 1).fingerprint
    assert base == TokenBlocks(tokens.astype(np.uint16), 8, 1).fingerprint
    changed = tokens.copy()
    changed[50] = 7
    others = {
        TokenBlocks(t, n, s).fingerprint for t, n, s in [(changed, 8, 1), (tokens, 9, 1), (tokens, 8, 2), (tokens[:-1], 8, 1)]
    }
    assert len(others) == 4
    assert base not in others


def test_progress_in_epochs() -> None:
    assert TokenBlocks(np.arange(40), 4, 0).epochs(5, 4) == 2.0


def test_too_little_text_says_how_much_there_is() -> None:
    assert len(TokenBlocks(np.arange(2048), 2048, 0)) == 1
    with pytest.raises(UsageError, match="2,047 tokens and one block needs 2,048"):
        TokenBlocks(np.arange(2047), 2048, 0)


def test_impossible_blocks() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        TokenBlocks(np.arange(9), 1, 0)
    with pytest.raises(UsageError, match="seed is -1"):
        TokenBlocks(np.arange(9), 2, -1)
    with pytest.raises(ValueError, match="one-dimensional"):
        TokenBlocks(np.zeros((2, 2), dtype=int), 2, 0)
    with pytest.raises(ValueError, match="step"):
        TokenBlocks(np.arange(9), 2, 0).batch(-1, 1)
