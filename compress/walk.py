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


def check_inside(refs: Sequence[WeightRef]) -> None:
    """Raise UsageError for matrices outside the decoder blocks."""
    outside = [ref.name for ref in refs if ref.layer is None]
    if outside:
        raise UsageError(
            f"{', '.join(outside)}: outside the decoder blocks, where work block by block does not reach; exclude it"
        )


@dataclass(frozen=True)
class BlockCall:
    """One call of a block as the model makes it, without the hidden states."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, state: Tensor) -> Tensor:
        """Hidden states in, hidden states out. A copy goes in: some blocks add to their input in place."""
        return _hidden(self.module(state.clone(), *self.args, **self.kwargs))

    def to(self, device: torch.device) -> BlockCall:
        """The same call with its tensors on a device; the module stays where it is."""
        return BlockCall(self.module, _moved(self.args, device), _moved(self.kwargs, device))


class _Stop(Exception):
    pass


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def catch_calls(
    model: nn.Module, blocks: list[Block], batches: Sequence[Tensor | Mapping[str, Tensor]]
) -> Iterator[tuple[Tensor, list[BlockCall]]]:
    """For each batch the hidden states `[batch, length, hidden]` that enter the first block, and the calls of all `blocks`.

    `batches` are token ids, int64 `[batch, length]`, or the model's keyword arguments. Take it within `measuring`. Masks and
    position embeddings can differ from layer to layer, so the model itself has to call every block. The first batch takes a
    real pass, which shows that the hidden states go straight from block to block. Then the blocks hand on their input as it is,
    so that the passes cost nothing, and the first batch shows again that arguments do not depend on hidden states. A batch whose
    arguments equal those of the batch before shares them (batches of one shape without padding do), so they take memory once.

    Raises UsageError for no batches and CompressError for a model whose blocks cannot be run one after the other.
    """
    if not batches:
        raise UsageError("calibration needs at least one batch of tokens")
    _, real, plain = _pass(model, blocks, batches[0], skip=False)
    before = real
    for index, batch in enumerate(batches):
        state, calls, _ = _pass(model, blocks, batch, skip=plain)
        same = [_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(before, calls, strict=True)]
        if index == 0 and not all(same):
            raise CompressError(
                f"{type(model).__name__} computes arguments of its blocks from hidden states, so its blocks cannot be run one by one"
            )
        before = [a if equal else b for a, b, equal in zip(before, calls, same, strict=True)]
        yield state, before


def _pass(
    model: nn.Module, blocks: list[Block], batch: Tensor | Mapping[str, Tensor], skip: bool
) -> tuple[Tensor, list[BlockCall], bool]:
    """One pass up to the last of `blocks`: the first hidden states, the calls, and whether all blocks return a plain tensor.

    With `skip` the blocks return their input.
    """
    entering: list[Tensor] = []
    calls: list[BlockCall] = []
    outputs: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        entering.append(state)
        calls.append(BlockCall(module, rest, kwargs))
        if len(calls) == len(blocks):
            raise _Stop

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.append(output)

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
    in_order = [call.module for call in calls] == [block.module for block in blocks]
    if not in_order or not all(_same(_hidden(out), state) for out, state in zip(outputs, entering[1:], strict=False)):
        raise CompressError(
            f"{type(model).__name__} does not run its blocks one straight after the other, so its blocks cannot be run one by one"
        )
    return entering[0], calls, all(isinstance(output, Tensor) for output in outputs)


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
    """Whether two arguments are equal; objects without a value of their own (caches) count as equal when of one type."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (bool, int, float, str)):
        return bool(a == b)
    return type(a) is type(b)
