"""A model whose decoder blocks are in memory one at a time, read from the checkpoint's files when they run.

Everything outside the blocks (embeddings, the last norm, the head) is there all the time. A block that is called is loaded before its
forward pass and freed after it; work on a block holds it (`holding`), so that what was changed in it stays until then. So a model of any
size can be measured and quantised in the memory of one block, at the cost of reading it again for every pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, stored_name
from compress.device import dtype_on, pick_device
from compress.errors import UsageError
from compress.export.source import FileSource, open_source
from compress.models import LoadedModel, load_model, load_tokenizer
from compress.structure import Block, decoder_blocks, join

Change = Callable[[Block], None]  # alters the weights of a block that has just been loaded


class StreamedModel:
    """A model with its blocks on files (`streamed`) or wholly in memory, behind one interface.

    loaded: the model and its tokenizer; streamed blocks are on the meta device while they are not held. change: called with every
    block after it was loaded (not for a model in memory).
    """

    def __init__(self, loaded: LoadedModel, source: FileSource | None, device: torch.device) -> None:
        self.loaded, self.device = loaded, device
        self.model: Any = loaded.model
        self.blocks = decoder_blocks(self.model)
        self.change: Change | None = None
        self._source = source
        self._held: set[int] = set()
        self._loaded: set[int] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        if source is not None:
            for block in self.blocks:
                self._handles += self._hooks(block)

    @property
    def streamed(self) -> bool:
        return self._source is not None

    @contextmanager
    def holding(self, block: Block) -> Iterator[None]:
        """Keep a block in memory; on leaving it is freed, and what was changed in it is lost if it is streamed."""
        if not self.streamed or block.index in self._held:
            yield
            return
        self._load(block)
        self._held.add(block.index)
        try:
            yield
        finally:
            self._held.discard(block.index)
            self._free(block)

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def fingerprint(self) -> str:
        """sha256 that tells this model from others.

        Of a streamed one: its configuration, the headers of its files and 64 KiB out of the middle of each, not all of its bytes.
        """
        if self._source is None:
            from compress.models import fingerprint

            return fingerprint(self.model)
        return files_fingerprint(self._source.checkpoint)

    def _hooks(self, block: Block) -> list[torch.utils.hooks.RemovableHandle]:
        def before(module: nn.Module, args: Any) -> None:
            if block.index not in self._held and not _skips(module):
                self._load(block)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if block.index not in self._held and not _skips(module):
                self._free(block)

        # First in line: other hooks may look at the weights.
        return [block.module.register_forward_pre_hook(before, prepend=True), block.module.register_forward_hook(after)]

    def _load(self, block: Block) -> None:
        assert self._source is not None
        for left in self._loaded - self._held - {block.index}:  # by a pass that was cut short, as those that catch calls are
            self._free(self.blocks[left])
        self._loaded.add(block.index)
        for name, tensor in [*block.module.named_parameters(), *_persistent_buffers(block.module)]:
            if tensor.is_meta:
                _put(block.module, name, read_parameter(self._source, join(block.name, name), tensor).to(self.device))
        if self.change is not None:
            self.change(block)

    def _free(self, block: Block) -> None:
        self._loaded.discard(block.index)
        for name, tensor in [*block.module.named_parameters(), *_persistent_buffers(block.module)]:
            _put(block.module, name, torch.empty_like(tensor, device="meta"))


def open_streamed(
    source: str,
    *,
    stream: bool | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """Open a model for work block by block.

    stream: True reads blocks when they run, False loads the model whole, None streams models that take more than a quarter of the
    memory that is free. Raises UsageError for a source that cannot be streamed (a GGUF file, weights that are not safetensors).
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    place = pick_device(device)
    if stream is not False:
        found = open_source(source, **options)
        large = isinstance(found, FileSource) and _large(found.checkpoint)
        if stream and not isinstance(found, FileSource):
            raise UsageError(f"{source} cannot be streamed: only safetensors can be read piece by piece; set stream to false")
        if isinstance(found, FileSource) and (stream or large):
            return _skeleton(source, found, dtype, place, options)
    return StreamedModel(load_model(source, dtype=dtype, device=device, **options), None, place)


def _skeleton(source: str, files: FileSource, dtype: str, device: torch.device, options: dict[str, Any]) -> StreamedModel:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from compress.models import model_class

    config = AutoConfig.from_pretrained(files.checkpoint.path, trust_remote_code=options["trust_remote_code"])
    wanted = dtype_on(device, dtype)
    kind = {} if wanted is None else {"dtype": wanted}
    with init_empty_weights(include_buffers=False):  # rotary frequencies and the like are computed, not read
        model: Any = model_class(config).from_config(config, trust_remote_code=options["trust_remote_code"], **kind)
    model.tie_weights()
    model.eval()
    inside = [block.name + "." for block in decoder_blocks(model)]
    read: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if id(parameter) not in read:
            value = read_parameter(files, name, parameter).to(device)
            read[id(parameter)] = nn.Parameter(value, requires_grad=False)
        _put(model, name, read[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        if not any(name.startswith(prefix) for prefix in inside):
            _put(model, name, buffer.to(device))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    words = load_tokenizer(source, revision=options["revision"], trust_remote_code=options["trust_remote_code"])
    return StreamedModel(LoadedModel(model, words, source, files.folder), files, device)


@torch.no_grad()
def read_parameter(source: FileSource, name: str, like: Tensor) -> Tensor:
    """One parameter or buffer of the model, whole, out of the files, in the type of `like`. Raises UsageError when it is not there."""
    checkpoint = source.checkpoint
    direct = stored_name(source.model, name, checkpoint.tensors)
    if direct is not None and checkpoint.tensors[direct].shape == tuple(like.shape):
        return checkpoint.read(direct).to(like.dtype)
    if like.dim() < 2:
        tied = _tied_to(source, name)
        if tied is None:
            raise UsageError(f"{source.name} has no tensor {name} {list(like.shape)}; it is not a whole checkpoint of its model")
        return read_parameter(source, tied, like)
    if direct is None and (tied := _tied_to(source, name)) is not None:
        return read_parameter(source, tied, like)
    if like.dim() == 2:
        return source.matrix(name, -1).to(like.dtype)
    result = torch.empty(like.shape, dtype=like.dtype)
    for expert in range(len(result)):
        result[expert] = source.matrix(name, -1, expert)
    return result


def _tied_to(source: FileSource, name: str) -> str | None:
    """Another name of the same parameter, which the checkpoint has."""
    try:
        wanted = source.model.get_parameter(name)
    except AttributeError:
        return None
    for other, parameter in source.model.named_parameters(remove_duplicate=False):
        if parameter is wanted and other != name and stored_name(source.model, other, source.checkpoint.tensors) is not None:
            return other
    return None


def files_fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over config.json, and of every file its header and 64 KiB from its middle."""
    total = hashlib.sha256((checkpoint.path / "config.json").read_bytes())
    for file in sorted(checkpoint.metadata):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            total.update(stream.read(length))
            stream.seek(file.stat().st_size // 2)
            total.update(stream.read(1 << 16))
    return total.hexdigest()


def _large(checkpoint: Checkpoint) -> bool:
    import psutil

    size = sum(file.stat().st_size for file in checkpoint.metadata)
    return size > psutil.virtual_memory().available / 4


def _skips(module: nn.Module) -> bool:
    """Whether a call of the module hands on its input as it is (`compress.walk`), so that its weights are not needed."""
    return hasattr(vars(module).get("forward"), "skips")


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield join(prefix, name), buffer


def _put(root: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, by its name in `root`."""
    module_name, _, own = name.rpartition(".")
    module = root.get_submodule(module_name)
    if own in module._parameters:
        module._parameters[own] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[own] = value
