"""Text sources of every format, tokenisation, and token blocks."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import prose, tiny_tokenizer

import compress.data
from compress.data import TextSource, TokenBlocks, iter_documents, read_text, tokenize
from compress.errors import UsageError

DOCUMENTS = ["first\none", "", "zweites – Ü", "third\r\nline", "4", "five five", "six", "seven", "eight", "nine"]


def lines(field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: document}) + "\n" for i, document in enumerate(DOCUMENTS))


def write(folder: Path, kind: str, field: str = "text") -> Path:
    """DOCUMENTS in one of the file formats."""
    path = folder / kind
    if kind.endswith(".parquet"):
        pq.write_table(pa.table({"id": list(range(len(DOCUMENTS))), field: DOCUMENTS}), path, row_group_size=3)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(field).encode()))
    elif kind == "array.json":
        path.write_text(json.dumps([{field: document} for document in DOCUMENTS], indent=1), encoding="utf-8")
    else:
        path.write_text(lines(field), encoding="utf-8")
    return path


RECORD_FILES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "array.json", "a.parquet"]


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- files


def test_a_plain_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    text = "\n\n one\r\ntwo\n – Ü \n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_text(TextSource(path=str(tmp_path / "a.txt"))) == [text]


def test_an_asset() -> None:
    (document,) = read_text(TextSource(path="asset:wikitext2-test"))
    assert document.startswith("\n\n = Robert Boulter = \n")


@pytest.mark.parametrize("kind", RECORD_FILES)
def test_every_record_format(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, "content")
    assert read_text(TextSource(path=str(path), field="content")) == DOCUMENTS


@pytest.mark.parametrize("kind", RECORD_FILES)
def test_span_and_documents_count_records(tmp_path: Path, kind: str) -> None:
    path = str(write(tmp_path, kind))
    assert read_text(TextSource(path=path, documents=3)) == DOCUMENTS[:3]
    assert read_text(TextSource(path=path, span=(0, 0.75))) == DOCUMENTS[:7]
    assert read_text(TextSource(path=path, span=(0.75, 1))) == DOCUMENTS[7:]
    assert read_text(TextSource(path=path, documents=8, span=(0.5, 1))) == DOCUMENTS[4:8]


def test_folders_and_globs_are_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in {"b.txt": "B", "a.txt": "A", "deep/c.TXT": "C", "README.md": "no", "z.bin": "no"}.items():
        (tmp_path / name).write_text(text)
    assert read_text(TextSource(path=str(tmp_path))) == ["A", "B", "C"]
    assert read_text(TextSource(path=str(tmp_path / "*.txt"))) == ["A", "B"]
    assert read_text(TextSource(path=str(tmp_path / "**" / "*.[tT]*"))) == ["A", "B", "C"]
    assert read_text(TextSource(path=str(tmp_path), documents=2)) == ["A", "B"]


def test_a_span_of_several_plain_files_is_taken_in_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.txt").write_text("abcd")
    assert read_text(TextSource(path=str(tmp_path), span=(0.5, 1))) == ["56789", "cd"]


@given(text=st.text(min_size=1, max_size=60).filter(lambda t: t.strip()), cut=st.floats(0.01, 0.99))
def test_two_spans_that_meet_share_nothing_and_miss_nothing(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: float
) -> None:
    path = tmp_path_factory.mktemp("span") / "a.txt"
    path.write_bytes(text.encode("utf-8", "replace"))
    text = path.read_bytes().decode()
    parts = []
    for span in ((0.0, cut), (cut, 1.0)):
        expected = text[int(len(text) * span[0]) : int(len(text) * span[1])]
        source = TextSource(path=str(path), span=span)
        if expected.strip():
            assert read_text(source) == [expected]
        else:
            with pytest.raises(UsageError, match="holds no text"):
                read_text(source)
        parts.append(expected)
    assert "".join(parts) == text


# --- datasets


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["a.parquet", "a.jsonl"])
@pytest.mark.usefixtures("dataset_cache")
def test_a_local_dataset_folder(tmp_path: Path, kind: str, streaming: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, kind)
    source = TextSource(dataset=str(folder), streaming=streaming)
    assert read_text(source) == DOCUMENTS
    part = TextSource(dataset=str(folder), streaming=streaming, documents=8, span=(0.5, 1))
    assert read_text(part) == DOCUMENTS[4:8]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_saved_to_disk(tmp_path: Path, streaming: bool) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    assert read_text(TextSource(dataset=str(tmp_path / "rows"), streaming=streaming)) == DOCUMENTS
    assert read_text(TextSource(dataset=str(tmp_path / "splits"), split="test", streaming=streaming)) == DOCUMENTS[:1]
    with pytest.raises(UsageError, match="no split 'dev'; its splits are train, test"):
        read_text(TextSource(dataset=str(tmp_path / "splits"), split="dev"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("dataset_cache")
def test_faults_of_a_dataset(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "a.jsonl")
    with pytest.raises(UsageError, match="no field 'body'; the fields are id, text"):
        read_text(TextSource(dataset=str(folder), field="body", streaming=streaming))
    with pytest.raises(UsageError, match="check its name, configuration"):
        read_text(TextSource(dataset=str(folder), split="nowhere", streaming=streaming))
    with pytest.raises(UsageError, match="'id' is int, not text"):
        read_text(TextSource(dataset=str(folder), field="id", streaming=streaming))


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError("too slow")])
def test_an_unreachable_hub_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=r"some/where cannot be reached \((no route|too slow)\).*local file with `path:`"):
        read_text(TextSource(dataset="some/where"))


@pytest.mark.parametrize("transport", [True, False])
def test_a_failure_amid_a_stream(monkeypatch: pytest.MonkeyPatch, transport: bool) -> None:
    """The hub's HTTP client raises errors of its own, which are neither OSError nor ValueError."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]
    assert not issubclass(http_error, (OSError, ValueError))

    class Stream:
        column_names = None

        def __iter__(self) -> Any:
            yield {"text": "one"}
            raise http_error("reset") if transport else ValueError("bad shard")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Stream())
    documents = iter_documents(TextSource(dataset="some/where", streaming=True))
    assert next(documents) == "one"
    with pytest.raises(UsageError, match="cannot be reached" if transport else "cannot be loaded: bad shard"):
        next(documents)


def test_the_hub_is_asked_for_what_the_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"body": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text(TextSource(dataset="allenai/c4", name="en", split="validation", field="body")) == ["x"]
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "streaming": False})]


# --- faults


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}\n', "line 2: there is no field 'text'; the fields are body, id"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "line 2: field 'text' is NoneType, not text"),
        ("a.jsonl", b'"x"\n', "line 1: expected an object with the field 'text', found str"),
        ("a.json", b'[{"text": "x"},\n {"text" 1}]', "line 2: not valid JSON"),
        ("a.json", b'[{"text": "x"}, {"body": "x"}]', "record 1: there is no field 'text'; the fields are body"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-12], "cannot be read"),
        ("a.parquet", b"PAR1 not parquet", "not a readable parquet file"),
        ("a.txt", b"ab\xff", r"not UTF-8 text \(byte 2"),
        ("a.txt", b"  \n\t\n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.csv", b"text\nx\n", r"must end in one of \.txt, \.jsonl"),
    ],
)
def test_a_faulty_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_text(TextSource(path=str(tmp_path / name)))


def test_a_parquet_file_without_the_field_lists_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no field 'text'; the fields are id, content"):
        read_text(TextSource(path=str(write(tmp_path, "a.parquet", "content"))))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file or folder"):
        read_text(TextSource(path=str(tmp_path / "none.txt")))
    with pytest.raises(UsageError, match="matches no text file"):
        read_text(TextSource(path=str(tmp_path)))
    with pytest.raises(UsageError, match="matches no text file"):
        read_text(TextSource(path=str(tmp_path / "*.txt")))
    with pytest.raises(UsageError, match="is a model, not a text"):
        read_text(TextSource(path="asset:tiny-llama"))


def test_plain_text_and_records_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    write(tmp_path, "b.jsonl")
    with pytest.raises(UsageError, match="two sources"):
        read_text(TextSource(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either `path:`"),
        ({"path": "a", "dataset": "b"}, "not both"),
        ({"path": "a", "span": (0.5, 0.5)}, "from < to"),
        ({"path": "a", "span": (0, 1.1)}, "from < to"),
        ({"path": "a", "weight": 0.0}, "positive"),
        ({"path": "a", "weight": float("nan")}, "positive"),
        ({"path": "a", "documents": 0}, "at least 1"),
        ({"path": "a", "streaming": True}, "only a `dataset:`"),
        ({"dataset": "a", "streaming": True, "span": (0, 0.5)}, "needs `documents:`"),
    ],
)
def test_impossible_sources(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TextSource(**fields)


# --- tokenize


def test_each_document_is_followed_by_eos_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    tok = tiny_tokenizer(adds_bos=True)
    path = str(write(tmp_path, "a.jsonl"))
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
    ids = tokenize(TextSource(path=str(write(tmp_path, "a.jsonl"))), tok)
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
    return "".join(map(chr, tokenize(sources, Letters(), limit)))  # type: ignore[arg-type]


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
    low, numbers, counter = (1 << 64) - 1, [], 1
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
