"""Every compressible matrix of a model, one by one, whatever its layout.

transformers 5 stores the experts of a mixture as fused 3-D parameters, GPT-2 stores its linear layers transposed, GPT-OSS
interleaves gate and up. A `WeightRef` hides all that: it names one matrix and gives it as `[out, in]`, in the memory of the
parameter itself. Pruning, mask learning, calibration, quantisation, packing and reports see nothing else of a model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.structure import (
    Block,
    ExpertGroup,
    decoder_blocks,
    expert_groups,
    expert_parameters,
    is_conv1d,
    is_linear,
    join,
    router_parameters,
    text_config,
)

__all__ = ["Block", "ParameterRef", "WeightRef", "by_parameter", "decoder_blocks", "expert_roles", "find_weights"]


@dataclass(frozen=True, eq=False)
class WeightRef:
    """One weight matrix.

    `name` is unique to the matrix; `full_name` is the parameter it lies in, the key of a mask set. `expert` is the index in its
    mixture, None outside of one. `contracted_dim` (-1 or -2) is the dimension *of the parameter* that a product sums over.
    `layer` is the index of its decoder block, None outside the blocks.
    """

    name: str
    module: nn.Module
    module_name: str
    parameter_name: str
    expert: int | None
    role: str
    contracted_dim: int
    layer: int | None
    _rows: slice = field(
        default_factory=lambda: slice(None), repr=False
    )  # which rows of the slice's [out, in] matrix: a half of a gate_up

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrix. Raises CompressError while a parametrization stands in its place."""
        parameter = getattr(self.module, self.parameter_name)
        if not isinstance(parameter, nn.Parameter):
            raise CompressError(f"{self.full_name} is computed from other tensors just now; remove its parametrization first")
        return parameter

    @property
    def full_name(self) -> str:
        """Name of the parameter in `model.named_parameters()`."""
        return join(self.module_name, self.parameter_name)

    def whole(self) -> Tensor:
        """The matrix a product with the parameter (with this expert's slice of it) uses: `[out, in]`, gate and up together."""
        return self._matrix(self.parameter.detach())

    def view(self) -> Tensor:
        """This matrix, `[out, in]`: detached, in the memory of the parameter (often strided), so writing to it alters the model."""
        return self.whole()[self._rows]

    def slice_of(self, tensor: Tensor) -> Tensor:
        """This matrix's part of any tensor of the parameter's shape (its mask, a copy of it): a view, `[out, in]`."""
        return self._matrix(tensor)[self._rows]

    def _matrix(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 3:
            assert self.expert is not None
            tensor = tensor[self.expert]
        return tensor if self.contracted_dim == -1 else tensor.T

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        out, contracted = self.view().shape
        return out, contracted


@dataclass(frozen=True, eq=False)
class ParameterRef:
    """One parameter with all the matrices in it (`refs`, in order); `name` is its key in a mask set."""

    name: str
    module: nn.Module
    parameter_name: str
    contracted_dim: int
    layer: int | None
    refs: list[WeightRef]


@dataclass(frozen=True)
class _Candidate:
    ref: WeightRef
    default: bool  # found unless excluded; the others only when a pattern asks for them
    problem: str | None = None  # why it cannot be compressed, though a pattern may select it


def find_weights(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[WeightRef]:
    """The matrices of `model` that the patterns select, in the order of `named_parameters()`.

    Patterns are shell globs (`fnmatch`, case counts) on a matrix's `name` and on its `full_name`. By default these are all
    matrices inside the decoder blocks but routers. A pattern of `include` that matches none of them may name routers and
    matrices outside the blocks (`lm_head*`). Tied weights, embeddings and norms are never selected.

    Raises UsageError for a pattern that matches nothing, for a tied weight asked for by name, for fused experts whose layout
    neither flags nor shapes decide, and when nothing is left.
    """
    candidates = _candidates(model)
    every_name = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    chosen: set[str] = set()
    for pattern in include:
        matching = [c for c in candidates if _matches(c.ref, pattern)]
        matching = [c for c in matching if c.default] or matching
        if not matching:
            raise UsageError(_no_match("include", pattern, candidates, every_name))
        # A tied weight that a pattern reaches only beside others is passed over; one that was asked for is an error.
        sound = [c for c in matching if c.default or c.problem is None]
        if not sound:
            raise UsageError(f"include pattern {pattern!r}: {matching[0].problem}")
        chosen.update(c.ref.name for c in sound)
    for pattern in exclude:
        if not any(_matches(c.ref, pattern) for c in candidates) and not any(fnmatchcase(n, pattern) for n in every_name):
            raise UsageError(_no_match("exclude", pattern, candidates, every_name))
        chosen.difference_update(c.ref.name for c in candidates if _matches(c.ref, pattern))
    selected = [c for c in candidates if c.ref.name in chosen]
    if not selected:
        raise UsageError(f"no matrix is left: include {list(include)} and exclude {list(exclude)} select nothing together")
    for candidate in selected:
        if candidate.problem:
            raise UsageError(candidate.problem)
    return [candidate.ref for candidate in selected]


def by_parameter(refs: Sequence[WeightRef]) -> list[ParameterRef]:
    """Group matrices by the parameter they lie in, in order of first appearance.

    Raises UsageError when only a part of a fused parameter is among them: a mask or a quantised form covers a parameter whole.
    """
    grouped: dict[str, list[WeightRef]] = {}
    for ref in refs:
        grouped.setdefault(ref.full_name, []).append(ref)
    result = []
    for name, members in grouped.items():
        first = members[0]
        covered, total = sum(ref.view().numel() for ref in members), first.parameter.numel()
        if covered != total:
            raise UsageError(
                f"{name}: only {len(members)} of its matrices are selected ({members[0].name}, ...), {covered} of {total} weights; "
                f"this needs all of a fused parameter or none: include or exclude it by its own name, {name!r}"
            )
        result.append(ParameterRef(name, first.module, first.parameter_name, first.contracted_dim, first.layer, members))
    return result


def _matches(ref: WeightRef, pattern: str) -> bool:
    return fnmatchcase(ref.name, pattern) or fnmatchcase(ref.full_name, pattern)


def _no_match(kind: str, pattern: str, candidates: list[_Candidate], every_name: list[str]) -> str:
    other = next((name for name in every_name if fnmatchcase(name, pattern)), None)
    if other is not None:
        return f"{kind} pattern {pattern!r} matches {other}, which is not a weight matrix that can be compressed"
    core = pattern.strip("*.")
    # One line for all layers and experts alike: with numbers as stars it is itself a pattern that works.
    names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", n) for c in candidates for n in (c.ref.name, c.ref.full_name)))

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, core, part).ratio() for part in (name, *name.split(".")))

    near = sorted(names, key=likeness, reverse=True)[:5]
    return f"{kind} pattern {pattern!r} matches no weight matrix; the nearest are: {', '.join(near)}"


def _candidates(model: nn.Module) -> list[_Candidate]:
    """All matrices of linear layers and experts, and bare router parameters, in the order of `named_parameters()`."""
    blocks = decoder_blocks(model)
    groups: dict[str, ExpertGroup] = {}
    routers: set[str] = set()
    for block in blocks:
        groups.update({group.name: group for group in expert_groups(model, block)})
        routers.update(router_parameters(model, block))
    embeddings = [(join(n, "weight"), m.weight) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    result: list[_Candidate] = []
    seen: set[int] = set()
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        module_name, _, parameter_name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        inside = next((b for b in blocks if full_name.startswith(b.name + ".")), None)
        layer = inside.index if inside else None
        if isinstance(module, nn.Embedding) or not parameter.is_floating_point():
            continue
        tied = next((name for name, other in embeddings if _same_memory(parameter, other)), None)
        if id(parameter) in seen and tied is None:
            continue  # a block that several layers share is one matrix, under its first name
        seen.add(id(parameter))
        group = groups.get(module_name)
        if group is not None and group.fused and parameter.dim() == 3:
            result += _fused(model, group, parameter_name, layer)
            continue
        conv1d = parameter_name == "weight" and is_conv1d(module)
        linear = parameter_name == "weight" and is_linear(module)
        if not (linear or conv1d or full_name in routers):
            continue
        expert, role = _place(module_name, groups)
        ref = WeightRef(full_name, module, module_name, parameter_name, expert, role, -2 if conv1d else -1, layer)
        problem = (
            f"{full_name} is tied to {tied} (one tensor, two uses), so compressing it would alter the embedding" if tied else None
        )
        result.append(_Candidate(ref, inside is not None and full_name not in routers and not tied, problem))
    return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.is_meta or b.is_meta:
        return False
    return a.data_ptr() == b.data_ptr() != 0


def _place(module_name: str, groups: dict[str, ExpertGroup]) -> tuple[int | None, str]:
    """Expert index and role of a linear layer: `...experts.3.w1` in a list of experts -> `(3, "w1")`."""
    parts = module_name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        group = groups.get(".".join(parts[:length]))
        if group is not None and not group.fused and parts[length].isdigit():
            return int(parts[length]), parts[-1]
    return None, parts[-1]


def _fused(model: nn.Module, group: ExpertGroup, parameter_name: str, layer: int | None) -> Iterator[_Candidate]:
    """The matrices of one fused 3-D parameter: expert by expert, gate before up."""
    module, shape = group.module, getattr(group.module, parameter_name).shape
    transposed = _is_transposed(model, module)
    problem = None
    if transposed is None:
        problem = (
            f"{join(group.name, parameter_name)} {list(shape)}: neither flags nor shapes say which dimension is contracted; "
            f"exclude {group.name + '.*'!r}"
        )
    dim = -2 if transposed else -1
    out = shape[1] if dim == -1 else shape[2]
    for expert in range(group.count):
        for role, rows in expert_roles(module, parameter_name, out).items():
            name = f"{group.name}.{expert}.{role}"
            yield _Candidate(WeightRef(name, module, group.name, parameter_name, expert, role, dim, layer, rows), True, problem)


def expert_roles(module: nn.Module, parameter_name: str, out: int) -> dict[str, slice]:
    """Which of the `out` rows of an expert's slice belong to which of its matrices, by role: gate and up lie in one parameter."""
    if parameter_name != "gate_up_proj":
        return {parameter_name: slice(None)}
    if getattr(module, "is_concatenated", True):
        return {"gate_proj": slice(0, out // 2), "up_proj": slice(out // 2, None)}
    return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}


def _is_transposed(model: nn.Module, module: nn.Module) -> bool | None:
    """Whether fused experts are stored `[E, in, out]`; None when neither flags nor shapes decide.

    Without the flag: the way round in which all parameters of the module fit sizes that are known: the module's own
    `input_size` and `output_size`, or the hidden size, which a projection down has as outputs and the others as inputs.
    """
    flag = getattr(module, "is_transposed", None)
    if flag is not None:
        return bool(flag)
    ends = (getattr(module, "output_size", None), getattr(module, "input_size", None))
    hidden = getattr(text_config(model), "hidden_size", None)

    def fits(name: str, shape: tuple[int, ...], transposed: bool) -> bool:
        out, contracted = reversed(shape[1:]) if transposed else shape[1:]
        if None not in ends:
            return (out, contracted) == ends
        return (out if "down" in name else contracted) == hidden

    parameters = expert_parameters(module)
    ways = [way for way in (False, True) if all(fits(name, tuple(p.shape), way) for name, p in parameters.items())]
    return ways[0] if len(ways) == 1 else None
