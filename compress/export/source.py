"""Where an export takes its tensors from: one matrix at a time out of a checkpoint's files, or out of a model in memory.

A source gives single matrices `[out, in]`, and the order in which everything goes into the shards of the export: the tensors that are
copied, and in place of each parameter that is packed the entries that stand for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from compress.checkpoint import COMPANIONS, INDEX_NAME, Checkpoint, as_stored, companion_files, read_json, stored_name
from compress.errors import UsageError
from compress.models import LoadedModel, load_model, meta_model, resolve_source
from maskllm.safefile import DTYPES, Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = ("F64", "F32", "F16", "BF16")
SHARD_BYTES = 5 * 10**9  # of an export whose source has no shards of its own


class MatrixSource(Protocol):
    """What an export needs of its source. `model` may be on the meta device; `folder` holds the source's files; `on_hub`: `name` is
    a name on the hub."""

    name: str
    model: PreTrainedModel
    folder: Path | None
    on_hub: bool

    def stored_names(self, parameter: str, contracted_dim: int) -> list[str]:
        """The names of the tensors in which the source holds a parameter."""
        ...

    def dtype(self, parameter: str, contracted_dim: int) -> torch.dtype:
        """The type in which the source holds a parameter."""
        ...

    def matrix(self, parameter: str, contracted_dim: int, expert: int = 0) -> Tensor:
        """One matrix `[out, in]` of a parameter, in that type."""
        ...

    def shards(self, packed: Mapping[str, tuple[int, Sequence[Entry]]]) -> list[list[Entry]]:
        """The content of every shard to be written: `packed` gives, with its contracted dimension, the entries in a parameter's place."""
        ...

    def write_companions(self, out: Path) -> None:
        """Write config.json, tokenizer and the like."""
        ...


def open_source(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> MatrixSource:
    """A source that reads safetensors files piece by piece, from a folder, `asset:NAME` or the hub (after a download).

    A GGUF file or a model with weights in another container is loaded into memory whole. Raises UsageError for a source that is none,
    or that is quantised already.
    """
    place = resolve_source(name)
    folder = download(name, revision) if place.folder is None else place.folder
    if place.gguf_file is None:
        if (folder / "config.json").is_file() and "quantization_config" in read_json(folder / "config.json"):
            raise UsageError(
                f"{name} is a quantised checkpoint (its config.json has a quantization_config); start from the unquantised model"
            )
        if (folder / INDEX_NAME).is_file() or (folder / "model.safetensors").is_file():
            model = meta_model(str(folder), trust_remote_code=trust_remote_code)
            return FileSource(name, model, folder, place.folder is None)
    words = place.gguf_file is not None  # else the tokenizer's files, if any, are copied as they are
    return ModelSource(load_model(name, revision=revision, trust_remote_code=trust_remote_code, tokenizer=words))


def download(name: str, revision: str | None) -> Path:
    """The local copy of a checkpoint on the hub. Raises UsageError when the hub does not give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*COMPANIONS, "*.safetensors", INDEX_NAME, "additional_chat_templates/*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{name} is no local path, and the hub does not give it: {first} Check the name and the network, or give a local folder."
        ) from error


@dataclass(frozen=True)
class _Piece:
    """A stored tensor that holds rows of a parameter. `rows[i]` says which row of the parameter (all experts counted through)
    its row i is; `transposed`: its rows lie in the file as columns."""

    stored: str
    rows: Tensor
    transposed: bool


class FileSource:
    """Reads the tensors of a safetensors folder when they are asked for."""

    def __init__(self, name: str, model: PreTrainedModel, folder: Path, on_hub: bool = False) -> None:
        self.name, self.model, self.on_hub = name, model, on_hub
        self.folder: Path | None = folder
        self.checkpoint = Checkpoint(folder)
        self._located: dict[tuple[str, int], list[_Piece]] = {}

    def stored_names(self, parameter: str, contracted_dim: int) -> list[str]:
        return [piece.stored for piece in self._pieces(parameter, contracted_dim)]

    def dtype(self, parameter: str, contracted_dim: int) -> torch.dtype:
        kinds = {self.checkpoint.tensors[piece.stored].dtype for piece in self._pieces(parameter, contracted_dim)}
        if len(kinds) > 1 or not kinds <= set(_FLOATS):
            raise UsageError(f"{self.name}: {parameter} is stored as {', '.join(sorted(kinds))}; one type of floats is needed")
        return DTYPES[kinds.pop()]

    def matrix(self, parameter: str, contracted_dim: int, expert: int = 0) -> Tensor:
        out, contracted = _matrix_shape(self.model.get_parameter(parameter).shape, contracted_dim)
        result = torch.empty(out, contracted, dtype=self.dtype(parameter, contracted_dim))
        for piece in self._pieces(parameter, contracted_dim):
            here = piece.rows // out == expert
            if bool(here.any()):
                result[piece.rows[here] - expert * out] = self._read(piece, expert, here)
        return result

    def _read(self, piece: _Piece, expert: int, here: Tensor) -> Tensor:
        """The rows of a piece that belong to an expert; where all experts lie in one tensor only this one's slice is read."""
        info = self.checkpoint.tensors[piece.stored]
        if len(info.shape) == 2:
            tensor = self.checkpoint.read(piece.stored)
            return (tensor.T if piece.transposed else tensor)[here]
        with safe_open(info.file, framework="pt") as file:
            tensor = file.get_slice(piece.stored)[expert]
        return tensor.T if piece.transposed else tensor

    def _pieces(self, parameter: str, contracted_dim: int) -> list[_Piece]:
        """Where the rows of a parameter lie in the files.

        A tensor with one element a row, numbered, goes the way that transformers takes when it saves the parameter: what splits,
        transposes and renames the parameter does so to the numbers, and where they come out is where the rows are.
        """
        if (parameter, contracted_dim) in self._located:
            return self._located[parameter, contracted_dim]
        shape = tuple(self.model.get_parameter(parameter).shape)
        single = list(shape)
        single[contracted_dim] = 1
        numbers = torch.arange(prod(single)).view(single)
        direct = stored_name(self.model, parameter, self.checkpoint.tensors)
        whole = direct is not None and self.checkpoint.tensors[direct].shape == shape
        parts = {parameter: numbers} if whole else as_stored(self.model, parameter, numbers)
        pieces = []
        for name, part in parts.items():
            stored = stored_name(self.model, name, self.checkpoint.tensors)
            if stored is None:
                raise UsageError(
                    f"{self.name} has no tensor {name}, the name under which transformers saves (part of) {parameter}; save the model "
                    "with save_pretrained and export from that folder"
                )
            transposed = part.shape[-1] != 1
            expected = list(part.shape)
            expected[-2 if transposed else -1] = shape[contracted_dim]
            found = self.checkpoint.tensors[stored].shape
            if found != tuple(expected) or (len(expected) == 3 and expected[0] != shape[0]):
                raise UsageError(f"{self.name}: {stored} is {list(found)}, but {expected} is what {parameter} needs")
            pieces.append(_Piece(stored, part.flatten(), transposed))
        self._located[parameter, contracted_dim] = pieces
        return pieces

    def shards(self, packed: Mapping[str, tuple[int, Sequence[Entry]]]) -> list[list[Entry]]:
        """The shards of the source, a packed parameter where its first piece was."""
        owner = {piece.stored: name for name, (dim, _) in packed.items() for piece in self._pieces(name, dim)}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        ours = {id(parameters[name]): name for name in packed}
        # A file may hold a parameter again under the name of another one that is tied to it.
        owner |= {name: ours[id(p)] for name, p in parameters.items() if id(p) in ours and name in self.checkpoint.tensors}
        waiting = {name: entries for name, (_, entries) in packed.items()}
        shards: dict[Path, list[Entry]] = {file: [] for file in self.checkpoint.metadata}
        for info in self.checkpoint.tensors.values():
            if info.name in owner:
                shards[info.file] += waiting.pop(owner[info.name], ())
            elif info.dtype not in DTYPES:
                raise UsageError(
                    f"{info.file}: {info.name} has dtype {info.dtype}, which cannot be copied; is this a quantised model?"
                )
            else:
                shards[info.file].append(
                    Entry(info.name, DTYPES[info.dtype], info.shape, partial(self.checkpoint.read, info.name))
                )
        return [entries for entries in shards.values() if entries]

    def write_companions(self, out: Path) -> None:
        copy_companions(self.checkpoint.path, out)


class ModelSource:
    """A model in memory: of a GGUF file, or of weights in a container that cannot be read piece by piece."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.name, self.model = loaded.source, loaded.model
        self.folder = None if loaded.gguf_file else loaded.folder
        self.on_hub = loaded.folder is None
        self._loaded = loaded

    def stored_names(self, parameter: str, contracted_dim: int) -> list[str]:
        return list(as_stored(self.model, parameter, self.model.get_parameter(parameter).detach().to("meta")))

    def dtype(self, parameter: str, contracted_dim: int) -> torch.dtype:
        return self.model.get_parameter(parameter).dtype

    def matrix(self, parameter: str, contracted_dim: int, expert: int = 0) -> Tensor:
        weight = self.model.get_parameter(parameter).detach()
        weight = weight[expert] if weight.dim() == 3 else weight
        return weight if contracted_dim == -1 else weight.T

    def shards(self, packed: Mapping[str, tuple[int, Sequence[Entry]]]) -> list[list[Entry]]:
        """Under the names that transformers saves; a tensor that several parameters share is written once, under the first name."""
        shards: list[list[Entry]] = [[]]
        size, seen = 0, set()
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            pieces = as_stored(self.model, name, value.detach()) if name not in packed else {}
            entries = list(packed[name][1]) if name in packed else [Entry.of(key, piece) for key, piece in pieces.items()]
            nbytes = sum(entry.nbytes for entry in entries)
            if size and size + nbytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1] += entries
            size += nbytes
        return shards

    def write_companions(self, out: Path) -> None:
        if self.folder is not None:
            copy_companions(self.folder, out)
            return
        model, tokenizer = self.model, self._loaded.tokenizer
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(out)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy config, tokenizer, licence and code files of a model folder."""
    for file in companion_files(source):
        target = out / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _matrix_shape(shape: Sequence[int], contracted_dim: int) -> tuple[int, int]:
    return (shape[-2], shape[-1]) if contracted_dim == -1 else (shape[-1], shape[-2])
