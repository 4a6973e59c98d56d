"""A checkpoint on disk as a set of named tensors: read from the safetensors headers, one tensor in memory at a time."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

INDEX_NAME = "model.safetensors.index.json"
SIDECAR_NAME = "compress.json"
UPDATED_FORMAT = "dense-updated"  # in that file: weights updated for a mask, nothing pruned yet (`compress prune --mask-out`)
# What belongs to a model beside its weights. Everything else in a source folder (optimizer states, logs, a card) is not copied.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "*.jinja", "chat_template*", "*preprocessor_config.json", "processor_config.json",
    "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor. `dtype` is the format's own name ("BF16")."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_header(file: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and tensors of one safetensors file, from its header alone. Raises UsageError when it is none or is truncated."""
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= size - 8:
                raise UsageError(f"{file} is not a safetensors file, or it is truncated")
            header: dict[str, Any] = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = TensorInfo(name, file, entry["dtype"], tuple(entry["shape"]), end - begin)
            if 8 + length + end > size:
                raise UsageError(f"{file} is truncated: {name} ends beyond the end of the file")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is not a safetensors file: its header cannot be read ({error})") from error
    return metadata, tensors


class Checkpoint:
    """The tensors of a model folder (sharded or not) or of one .safetensors file.

    Raises UsageError when there are none, a shard named in the index is missing, or two files hold the same name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        for file in checkpoint_files(path):
            self.metadata[file], tensors = read_header(file)
            if twice := tensors.keys() & self.tensors.keys():
                raise UsageError(f"{path}: {min(twice)} is in two files; is this more than one checkpoint?")
            self.tensors.update(tensors)

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype of the file."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a folder (those of its index when it has one) or the file itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such file or folder")
    if (path / INDEX_NAME).is_file():
        files = [path / name for name in sorted(set(read_json(path / INDEX_NAME).get("weight_map", {}).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UsageError(f"{path}: {INDEX_NAME} names {missing[0]}, which is not there; the download is incomplete")
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise UsageError(f"{path} holds no .safetensors file (it holds: {found}); convert the checkpoint to safetensors first")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UsageError when it cannot be read as one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{file} holds {type(value).__name__} where a JSON object belongs")
    return value


def companion_files(folder: Path) -> Iterator[Path]:
    """Config, tokenizer, licence and code files of a model folder."""
    for file in sorted(folder.iterdir()):
        name = file.name
        if file.is_file() and not name.endswith(".index.json") and any(fnmatch.fnmatch(name, glob) for glob in COMPANIONS):
            yield file
    yield from sorted((folder / "additional_chat_templates").glob("*.jinja"))


def as_stored(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter (or anything of its shape, such as its mask) under the names and in the layout that checkpoints use.

    transformers 5 fuses the experts of a checkpoint into one parameter when it loads them; this is the way back, so one fused
    parameter becomes many tensors. Most parameters stay as they are. `model` tells the conversion and may be on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, {name: tensor})
    except Exception as error:
        raise CompressError(
            f"{name}: transformers cannot bring this parameter back to its checkpoint layout ({error})"
        ) from error


def stored_name(model: PreTrainedModel, name: str, tensors: Mapping[str, object]) -> str | None:
    """The name among a checkpoint's `tensors` that the model loads as `name`, or None.

    Checkpoints of a bare base model lack its prefix ("transformer." of GPT-2); transformers loads both.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in tensors:
            return candidate
    return None
