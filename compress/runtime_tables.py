"""Run token embeddings and output heads that are rounded to int8, one scale a row (`compress.packed.Int8Table`).

In a small model with a large vocabulary they are most of what packing leaves: a fifth of SmolLM2-135M's weights, almost a third of Gemma-3-1B's.
A head is read whole for every token that is generated. On a CPU the compiled kernels read its int8 rows as they are (cpu_decode.h); for many tokens
at once, and elsewhere, some rows at a time are made floating-point and multiplied by torch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.device import multiplies
from compress.errors import UsageError
from compress.packed import Int8Table
from compress.runtime_experts import PackedModule
from compress_kernels.native import native
from compress_kernels.sparse24 import unwatched
from compress_kernels.sparse24.cpu import FLOATING
from compress_kernels.sparse24.decode import dense_tokens
from compress_kernels.sparse24.packing import to_int8

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEW = 16  # tokens that the kernel takes: each costs a pass over the rows, floating-point rows once as much as many
_CHUNK = 1 << 22  # weights of a head that are floating-point at once: 16 MiB


class Int8Embedding(PackedModule, nn.Embedding):
    """A token embedding of int8 rows: `[...] -> [..., embedding_dim]`, in the type that the rest of the model has.

    Buffers: `values` int8 `[V, H]`, `scale` float32 `[V]`, and `weight`, empty, whose type is that of the outputs. What is made by `convert`
    keeps the class of the embedding that it was as a base, which may do more to the rows (Gemma's scales them).
    """

    _parts = ("values", "scale")
    values: Tensor
    scale: Tensor

    @staticmethod
    def convert(module: nn.Embedding) -> None:
        """Make a dense embedding one of these, empty, on its device; the type of its weight stays that of its outputs."""
        weight = module.weight
        del module.weight
        _register(module, weight)
        module.padding_idx = None  # only gradients would know it, and transformers, which sets that row of the weight to 0
        plain: Any = type(module)
        module.__class__ = _mixed(plain)

    def forward(self, input: Tensor) -> Tensor:
        return (self.values[input].float() * self.scale[input].unsqueeze(-1)).to(self.weight.dtype)


def _register(module: nn.Module, weight: Tensor) -> None:
    """The buffers of rows in place of a dense weight."""
    module.register_buffer("values", torch.empty(weight.shape, dtype=torch.int8, device=weight.device))
    module.register_buffer("scale", torch.empty(len(weight), dtype=torch.float32, device=weight.device))
    # Networks and libraries ask the weight for its type and device.
    module.register_buffer("weight", weight.new_empty(0, *weight.shape[1:]).detach(), persistent=False)


@cache
def _mixed(plain: Any) -> Any:
    """The class of int8 embeddings that a class of dense ones becomes."""
    # Behind the class that it was: what that one does, it does to the rows of this one.
    return Int8Embedding if plain is nn.Embedding else type(f"Int8{plain.__name__}", (plain, Int8Embedding), {})


class Int8Head(PackedModule):
    """An output head of int8 rows: `[..., in_features] -> [..., out_features]`, in the type of its input.

    Buffers: `values` int8 `[out, in]`, `scale` float32 `[out]`, unless it is tied to an embedding, whose it then uses; `bias [out]` or None.
    """

    bias: Tensor | None

    def __init__(self, head: nn.Linear, tied: Int8Embedding | None) -> None:
        """In place of `head`, empty, on its device. tied: the embedding that has its rows."""
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        self._tied = (tied,) if tied is not None else ()  # in a tuple: it is no part of this module
        self._parts = () if tied is not None else ("values", "scale")
        if tied is None:
            _register(self, head.weight)
        self.register_buffer("bias", None if head.bias is None else torch.empty_like(head.bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        owner: Any = self._tied[0] if self._tied else self
        values, scale, bias = owner.values, owner.scale, self.bias
        few = x.numel() <= _FEW * x.shape[-1] and x.is_cpu and x.dtype in FLOATING and unwatched(x, bias)
        if few and native("sparse24").library is not None:
            return dense_tokens(x.contiguous(), values, bias, scale)
        return _product(x, values, scale, bias)

    def extra_repr(self) -> str:
        tied = ", tied" if self._tied else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{tied}"


def _product(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same by torch, some rows at a time, in a type that the device multiplies."""
    # A compiled product is the compiler's own business, which cannot look into what the machine has either.
    dtype = x.dtype if torch.compiler.is_compiling() or multiplies(x.dtype, x.device) else torch.float32
    step, inputs = max(1, _CHUNK // max(values.shape[1], 1)), x.to(dtype)
    parts = []
    for first in range(0, len(values), step):
        part = slice(first, first + step)
        rows = (values[part].float() * scale[part, None]).to(dtype)
        parts.append(nn.functional.linear(inputs, rows, None if bias is None else bias[part].to(dtype)).to(x.dtype))
    return torch.cat(parts, -1)


def find_tables(model: PreTrainedModel) -> list[Int8Table]:
    """The tables of a dense model: its token embedding, and its output head unless that is the same parameter.

    Raises UsageError where a model has none, or keeps them in modules of a kind that cannot run rounded.
    """
    embedding, head = _places(model)
    modules = [embedding] if head.weight is embedding.weight else [embedding, head]
    return [Int8Table(f"{_name_of(model, module)}.weight", tuple(module.weight.shape)) for module in modules]


def _places(model: PreTrainedModel) -> tuple[Any, Any]:
    """Token embedding and output head. Raises UsageError when they cannot be rounded."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if not _can_round(embedding) or type(head) is not nn.Linear or head.weight.shape != embedding.weight.shape:
        kinds = " and ".join(type(module).__name__ for module in (embedding, head))
        raise UsageError(f"embedding and head of this model ({kinds}) cannot be rounded to int8; leave them (--embedding dense)")
    return embedding, head


def _can_round(embedding: Any) -> bool:
    """Whether an embedding looks its rows up as `nn.Embedding` does, whatever it does to them after: tried with a single row."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return False
    row = nn.Parameter(torch.linspace(-1, 1, embedding.embedding_dim, dtype=torch.float32, device="cpu")[None])
    trial: Any = copy.deepcopy(embedding, {id(embedding.weight): row})
    trial.padding_idx = None  # it may be beyond the one row
    for owner in trial.modules():  # of a model without memory
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.ones_like(buffer, device="cpu"))
    ids = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    with torch.no_grad():
        try:
            expected = trial(ids)
            Int8Embedding.convert(trial)
            trial.values[:], trial.scale[:] = to_int8(row)
            found = trial(ids)
        except (AttributeError, IndexError, RuntimeError, TypeError):  # it looks into `weight` itself, or is no table
            return False
    return found.shape == expected.shape and bool(
        torch.allclose(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def install_tables(model: PreTrainedModel, tables: Iterable[Int8Table], where: str) -> None:
    """Put empty tables into a model (on the meta device, as a rule); their tensors are loaded after.

    Raises UsageError when the model has no such embedding or head.
    """
    wanted = {table.name: table.shape for table in tables}
    if not wanted:
        return
    embedding, head = _places(model)
    known = {f"{_name_of(model, module)}.weight": tuple(module.weight.shape) for module in (embedding, head)}
    # While transformers loads, what is to be tied is not one parameter yet.
    tied = f"{_name_of(model, head)}.weight" in model.all_tied_weights_keys
    if wanted != (dict(list(known.items())[:1]) if tied else known):
        raise UsageError(f"{where}: its int8 tables {', '.join(wanted)} are not embedding and head of its model")
    Int8Embedding.convert(embedding)
    parent, _, child = _name_of(model, head).rpartition(".")
    setattr(model.get_submodule(parent), child, Int8Head(head, embedding if tied else None).train(head.training))
    # There is no weight to tie any more: the head knows its embedding.
    for owner in model.modules():
        for keys in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(owner, keys, None)
            if isinstance(ties, dict):
                kept = {target: source for target, source in ties.items() if f".{target}".split(".")[-2] != child}
                setattr(owner, keys, kept)
