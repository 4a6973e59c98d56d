"""Text sources of every format, and what is said when one cannot be read."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import DOCUMENTS, write_records

from compress.errors import UsageError
from compress.text import TextSource, iter_documents, read_text

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
    path = write_records(tmp_path, kind, "content")
    assert read_text(TextSource(path=str(path), field="content")) == DOCUMENTS


@pytest.mark.parametrize("kind", RECORD_FILES)
def test_span_and_documents_count_records(tmp_path: Path, kind: str) -> None:
    path = str(write_records(tmp_path, kind))
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
    write_records(folder, kind)
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
    write_records(folder, "a.jsonl")
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
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], "cannot be read"),
        ("a.parquet", b"PAR1 not parquet", "not a readable parquet file"),
        ("a.txt", b"ab\xff", r"not UTF-8 text \(byte 2"),
        ("a.txt", b"  \n\t\n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.csv", b"text\nx\n", r"must end in one of \.txt, \.py"),
    ],
)
def test_a_faulty_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_text(TextSource(path=str(tmp_path / name)))


def test_a_parquet_file_without_the_field_lists_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no field 'text'; the fields are id, content"):
        read_text(TextSource(path=str(write_records(tmp_path, "a.parquet", "content"))))


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
    write_records(tmp_path, "b.jsonl")
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
