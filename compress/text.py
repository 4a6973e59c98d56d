"""Where text comes from: an embedded asset, local files, or a dataset of the Hugging Face hub.

A text is a sequence of *documents*. A plain `.txt` file is one document; a row of a `.jsonl`, `.json`, `.parquet` file or of a
hub dataset is one. Everything is read in a fixed order, so the same source always gives the same documents.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from compress.assets import PYTHON, asset_path, is_asset, python_files
from compress.errors import UsageError

# Source code is plain text too: a mask for a domain may be learned from the files of a project.
PLAIN_SUFFIXES = (".txt", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".ts", ".rs")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SUFFIXES = PLAIN_SUFFIXES + RECORD_SUFFIXES


@dataclass(frozen=True)
class TextSource:
    """One source of text. Exactly one of `path` and `dataset` is given; UsageError for anything impossible.

    path: `asset:NAME`, or a file, a folder (read recursively) or a glob of `.txt` and source code, or of `.jsonl`, `.json` (either
        with `.gz`) and `.parquet` files, in sorted order; other files of a folder or glob are left out.
    dataset: what `datasets.load_dataset` takes (a hub name or a local dataset folder), or a folder of `save_to_disk`;
        `name` is its configuration, `split` its split.
    field: the text column of a record.
    documents: look at the first so many documents only.
    span: the part (from, to) of the source to read, as fractions. Of a plain text file these are fractions of its characters:
        `text[int(len(text) * from) : int(len(text) * to)]`, file by file. Of records they are fractions of the documents (of
        the first `documents`, where that is given). So (0, 0.96) and (0.96, 1) share nothing and leave nothing out.
    streaming: read a hub dataset over the network as it is used, without downloading it first. A stream does not know its
        length, so a `span` of it needs `documents`.
    weight: share of this source's tokens in a mixture, relative to the other sources'.
    """

    path: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    field: str = "text"
    span: tuple[float, float] = (0.0, 1.0)
    streaming: bool = False
    documents: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise UsageError(
                "a text source needs either `path:` (a local file, folder or asset:NAME) or `dataset:`, and not both"
            )
        if len(self.span) != 2 or not 0 <= self.span[0] < self.span[1] <= 1:
            raise UsageError(f"span of {self.label} is {self.span}; it must be two fractions with 0 <= from < to <= 1")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(f"weight of {self.label} is {self.weight}; it must be a positive number")
        if self.documents is not None and self.documents < 1:
            raise UsageError(f"documents of {self.label} is {self.documents}; it must be at least 1")
        if self.streaming and self.dataset is None:
            raise UsageError(f"{self.label}: only a `dataset:` can be streamed; local files are read as they are used anyway")
        if self.streaming and not self.whole and self.documents is None:
            raise UsageError(f"{self.label}: a stream does not know its length, so a span of it needs `documents:` as well")

    @property
    def label(self) -> str:
        """How messages call this source."""
        if self.path is not None:
            return self.path
        return ":".join([str(self.dataset), *([self.name] if self.name else []), self.split])

    @property
    def whole(self) -> bool:
        """Whether the span leaves nothing out."""
        return self.span[0] == 0 and self.span[1] == 1

    @property
    def endless(self) -> bool:
        """Whether reading it to the end may mean reading a whole hub dataset over the network."""
        return self.streaming and self.documents is None


def iter_documents(source: TextSource) -> Iterator[str]:
    """The documents of a source one after another, exactly as they are stored (empty ones too, line ends untouched).

    Raises UsageError for a missing or unreadable file (with the line of a faulty record), a missing field (with the fields
    there are), a hub that cannot be reached, and a source without any text.
    """
    documents = _from_dataset(source) if source.dataset is not None else _from_files(source)
    found = False
    for document in documents:
        found = found or not (document == "" or document.isspace())
        yield document
    if not found:
        raise UsageError(f"{source.label} (span {source.span[0]:g} to {source.span[1]:g}) holds no text")


def read_text(source: TextSource) -> list[str]:
    """All documents of a source in memory; see `iter_documents`."""
    return list(iter_documents(source))


def read_plain(path: Path) -> str:
    """A UTF-8 text file as one string, nothing altered. Raises UsageError when it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); convert it, e.g. with iconv") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


# --- local files


def find_text_files(path: str) -> list[Path]:
    """The files that a `path:` names, sorted. Raises UsageError when there are none or a named file is of an unknown kind."""
    if path == PYTHON:
        return python_files()
    if is_asset(path):
        found = asset_path(path)
        if found.is_dir():
            raise UsageError(f"{path} is a model, not a text")
        return [found]
    place = Path(path).expanduser()
    if place.is_file():
        if not _suffix(place):
            raise UsageError(f"{path}: a text file must end in one of {', '.join(SUFFIXES)}")
        return [place]
    if place.is_dir():
        candidates: Iterable[Path] = place.rglob("*")
    elif glob.has_magic(path):
        candidates = map(Path, glob.glob(str(place), recursive=True))
    else:
        raise UsageError(f"there is no file or folder {path} (looked in {Path.cwd()}); a hub dataset is given with `dataset:`")
    files = sorted(file for file in candidates if file.is_file() and _suffix(file))
    if not files:
        raise UsageError(f"{path} matches no text file; a text file ends in one of {', '.join(SUFFIXES)}")
    return files


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _from_files(source: TextSource) -> Iterator[str]:
    files = find_text_files(str(source.path))
    plain = [file for file in files if _suffix(file) in PLAIN_SUFFIXES]
    if not plain:
        yield from _documents_of_span(_records(files, source.field), source)
    elif len(plain) < len(files):
        # A span is over characters in the one kind and over documents in the other.
        raise UsageError(f"{source.label} holds plain text and records ({files[0].name}, ...); give them as two sources")
    else:
        for file in plain[: source.documents]:
            text = read_plain(file)
            yield text[int(len(text) * source.span[0]) : int(len(text) * source.span[1])]


def _documents_of_span(documents: Iterator[str], source: TextSource) -> Iterator[str]:
    documents = islice(documents, source.documents)
    if source.whole:
        return documents
    listed = list(documents)
    return iter(listed[int(len(listed) * source.span[0]) : int(len(listed) * source.span[1])])


def _records(files: list[Path], field: str) -> Iterator[str]:
    for file in files:
        yield from _parquet(file, field) if file.name.lower().endswith(".parquet") else _json(file, field)


def _text_of(record: Any, field: str, where: str) -> str:
    """The text of one record; UsageError with the fields there are."""
    if not isinstance(record, dict):
        raise UsageError(f"{where}: expected an object with the field '{field}', found {type(record).__name__}")
    if field not in record:
        raise UsageError(f"{where}: there is no field '{field}'; the fields are {', '.join(map(str, record)) or '(none)'}")
    if not isinstance(record[field], str):
        raise UsageError(f"{where}: field '{field}' is {type(record[field]).__name__}, not text")
    return record[field]


def _json(path: Path, field: str) -> Iterator[str]:
    """JSON Lines, or one array of objects. C4's shards are JSON Lines named `.json`, so the content decides, not the name."""
    try:
        with _open(path) as file:
            first = file.readline()
            while first and not first.strip():
                first = file.readline()
            if first.lstrip().startswith("["):
                yield from _json_array(path, first + file.read(), field)
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UsageError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from error
                    yield _text_of(record, field, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError) as error:  # gzip raises both for a damaged file
        raise UsageError(f"{path} cannot be read: {error}") from error


def _json_array(path: Path, text: str, field: str) -> Iterator[str]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from error
    for index, record in enumerate(records):
        yield _text_of(record, field, f"{path}, record {index}")


def _open(path: Path) -> IO[str]:
    # newline="\n": a record ends at a line feed and nowhere else
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UsageError(f"{path}: there is no field '{field}'; the fields are {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text_of({field: value}, field, f"{path}, record {index}")
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is not a readable parquet file: {error}") from error


# --- datasets


def _from_dataset(source: TextSource) -> Iterator[str]:
    rows: Any = _load_dataset(source)
    if rows.column_names is not None and source.field not in rows.column_names:
        raise UsageError(f"{source.label}: there is no field '{source.field}'; the fields are {', '.join(rows.column_names)}")
    if source.streaming:
        return _documents_of_span(_rows(rows, source, 0), source)
    count = min(len(rows), source.documents or len(rows))
    begin, end = int(count * source.span[0]), int(count * source.span[1])
    return _rows(rows.select_columns([source.field]).select(range(begin, end)), source, begin)


def _rows(rows: Any, source: TextSource, begin: int) -> Iterator[str]:
    with _dataset_errors(source):  # a stream meets the network as it is read
        for index, row in enumerate(rows, begin):
            yield _text_of(row, source.field, f"{source.label}, record {index}")


def _load_dataset(source: TextSource) -> Any:
    import datasets

    name = str(source.dataset)
    folder = Path(name).expanduser()
    saved_to_disk = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    with _dataset_errors(source), _quiet_progress():
        if not saved_to_disk:
            target = str(folder) if folder.is_dir() else name
            return datasets.load_dataset(target, source.name, split=source.split, streaming=source.streaming)
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                raise UsageError(f"{name} has no split '{source.split}'; its splits are {', '.join(loaded)}")
            loaded = loaded[source.split]
        return loaded.to_iterable_dataset() if source.streaming else loaded


@contextlib.contextmanager
def _dataset_errors(source: TextSource) -> Iterator[None]:
    """Turn what `datasets` raises for a wrong name, configuration or split, damaged data or no network into UsageError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's HTTP client differs between versions of huggingface_hub; the base of its own error is that client's HTTPError.
    http_errors = HfHubHTTPError.__bases__
    try:
        yield
    except (DatasetsError, OSError, ValueError, *http_errors) as error:
        answered = isinstance(error, (DatasetsError, HfHubHTTPError, ValueError)) or (
            isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError))
        )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if answered:
            message = f"dataset {source.label} cannot be loaded: {reason}; check its name, configuration (`name:`) and `split:`"
        else:
            message = f"dataset {source.dataset} cannot be reached ({reason}); check the name and the network"
        raise UsageError(f"{message}, or give a local file with `path:`") from error


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """No progress bars of `datasets` where stderr is not a terminal."""
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    if sys.stderr.isatty() or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
