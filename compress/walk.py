"""Run the decoder blocks of a model one after the other, without the model: its hidden states are caught once, then every block is called alone.

What works on one block at a time builds on this: calibration of one-shot methods, and mask learning block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.structure import Block
from compress.weights import WeightRef

Batch = Tensor | Mapping[str, Tensor]  # token ids, int64 `[batch, length]`, or the model's keyword arguments


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Run fused experts one at a time (`experts_implementation = "eager"`); on leaving, every setting is as it was."""
    configs: dict[int, Any] = {}

    def collect(config: Any) -> None:
        if hasattr(config, "_experts_implementation") and id(config) not in configs:
            configs[id(config)] = config
            for key in getattr(config, "sub_configs", {}):
                collect(getattr(config, key, None))

    for module in model.modules():
        collect(getattr(module, "config", None))
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = {"": "eager"}  # the "" key: this configuration alone, not those inside it
        yield
    finally:
        for config, value in before:
            config._experts_implementation = {"": value}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, eager experts."""
    with torch.no_grad(), eager_experts(model), evaluating(model):
        yield


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it the module is on a device; then it is back where it was."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def check_inside(refs: Sequence[WeightRef]) -> None:
    """Raise UsageError for matrices outside the decoder blocks."""
    outside = [ref.name for ref in refs if ref.layer is None]
    if outside:
        raise UsageError(
            f"{', '.join(outside)}: outside the decoder blocks, where work block by block does not reach; exclude it"
        )


@dataclass(frozen=True)
class BlockCall:
    """One call of a block as the model makes it, without the hidden states.

    added: what the model adds to the hidden states that left the block before, of their shape; None for nothing. Models with DeepStack
    (arXiv 2406.04334) add features of the image between their first blocks.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None = None

    def run(self, state: Tensor) -> Tensor:
        """Hidden states of the block before in, hidden states out. A copy goes in: some blocks add to their input in place."""
        entering = state.clone() if self.added is None else state + self.added.to(state.device)
        return _hidden(self.module(entering, *self.args, **self.kwargs))

    def to(self, device: torch.device) -> BlockCall:
        """The same call with its tensors on a device; the module stays where it is."""
        return BlockCall(self.module, _moved(self.args, device), _moved(self.kwargs, device), _moved(self.added, device))


class _Stop(Exception):
    pass


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def catch_calls(model: nn.Module, blocks: list[Block], batches: Sequence[Batch]) -> Iterator[tuple[Tensor, list[BlockCall]]]:
    """For each batch the hidden states `[batch, length, hidden]` that enter the first block, and the calls of all `blocks`.

    `batches` are token ids, int64 `[batch, length]`, or the model's keyword arguments. Take it within `measuring`. Masks and
    position embeddings can differ from layer to layer, so the model itself has to call every block. The first batch of each kind
    (token ids, of which one sequence is enough, or one set of keyword arguments) takes a real pass. Then the blocks put out zeros, so
    that the passes cost next to nothing, and what enters the next block is exactly what the model adds in between. Both passes must
    agree: hidden states go from block to block with nothing but this added, and arguments do not depend on them. A batch
    whose arguments equal those of the batch before shares them (batches of one shape without padding do), so they take memory
    once. What a model adds after its last block is no part of this.

    Raises UsageError for no batches and CompressError for a model whose blocks cannot be run one after the other.
    """
    if not batches:
        raise UsageError("calibration needs at least one batch of tokens")
    seen: dict[frozenset[str], bool] = {}  # kinds of batches -> whether the blocks can be skipped
    before: list[BlockCall] = []
    for batch in batches:
        kind = frozenset(batch) if isinstance(batch, Mapping) else frozenset({"input_ids"})
        if kind not in seen:
            seen[kind] = _can_skip(model, blocks, batch[:1] if isinstance(batch, Tensor) else batch)
        found = _pass(model, blocks, batch, skip=seen[kind])
        before = [a if _same(a, b) else b for a, b in zip(before or found.calls, found.calls, strict=True)]
        state = found.entering[0]
        del found  # the hidden states of all blocks
        yield state, before


def _can_skip(model: nn.Module, blocks: list[Block], batch: Batch) -> bool:
    """Whether the blocks need not compute anything for their calls to be caught. Raises CompressError if they cannot be run one by one.

    Takes hidden states of all blocks, so one sequence is enough.
    """
    real = _pass(model, blocks, batch, skip=False)
    skip = all(isinstance(output, Tensor) for output in real.outputs)
    _check_agree(model, real, _pass(model, blocks, batch, skip=skip))
    return skip


@dataclass
class _Pass:
    """One pass up to the last block: hidden states that entered each block, what the blocks before the last put out, their calls."""

    entering: list[Tensor]
    outputs: list[Any]
    calls: list[BlockCall]


def _check_agree(model: nn.Module, real: _Pass, found: _Pass) -> None:
    """Raise CompressError unless the calls of `found` describe how the model went from block to block in a real pass."""
    for i, (state, call) in enumerate(zip(real.entering[1:], found.calls[1:], strict=True)):
        left = _hidden(real.outputs[i])
        if not _same(left if call.added is None else left + call.added, state):
            raise CompressError(
                f"{type(model).__name__} does not run its blocks one straight after the other, so its blocks cannot be run one by one"
            )
    if not all(_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(real.calls, found.calls, strict=True)):
        raise CompressError(
            f"{type(model).__name__} computes arguments of its blocks from hidden states, so its blocks cannot be run one by one"
        )


def _pass(model: nn.Module, blocks: list[Block], batch: Batch, skip: bool) -> _Pass:
    """One pass up to the last of `blocks`. With `skip` the blocks put out zeros, and the calls say what is added before them."""
    found = _Pass([], [], [])

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        added = state if skip and found.calls and bool(state.any()) else None
        found.entering.append(state)
        found.calls.append(BlockCall(module, rest, kwargs, added))
        if len(found.calls) == len(blocks):
            raise _Stop

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # A skipped block hands on its input, which is zeros already but for the first block and after an addition.
        blank = skip and (len(found.calls) == 1 or found.calls[-1].added is not None)
        found.outputs.append(torch.zeros_like(output) if blank else output)
        return found.outputs[-1]

    device = next(model.parameters()).device
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    with ExitStack() as stack:
        for module in {id(block.module): block.module for block in blocks}.values():
            stack.enter_context(_hook(module.register_forward_pre_hook(before, with_kwargs=True)))
            stack.enter_context(_hook(module.register_forward_hook(after, with_kwargs=True)))
            if skip:
                stack.enter_context(skipped(module))
        with suppress(_Stop):
            model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
    if [call.module for call in found.calls] != [block.module for block in blocks]:
        raise CompressError(
            f"{type(model).__name__} does not run its blocks one straight after the other, so its blocks cannot be run one by one"
        )
    return found


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skipped(module: nn.Module) -> Iterator[None]:
    """Let the module return its hidden states unchanged."""
    own = vars(module).get("forward")  # set on the instance by those who wrap a forward, as accelerate does

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    forward.skips = True  # type: ignore[attr-defined]  # whoever would load the module's weights for this call need not
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _moved(value: Any, device: torch.device) -> Any:
    """The same arguments with every tensor in them on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments or calls are equal; objects without a value of their own (caches) count as equal when of one type."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, BlockCall) and isinstance(b, BlockCall):
        return a.module is b.module and _same((a.args, a.kwargs, a.added), (b.args, b.kwargs, b.added))
    if isinstance(a, (bool, int, float, str)):
        return bool(a == b)
    return type(a) is type(b)
