"""Calibration block by block: every block is measured on what the already altered blocks before it put out.

This is the layer-sequential calibration of SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) and Wanda (Sun et al. 2023,
arXiv 2306.11695). What is measured of a block is `compress.capture`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.capture import InputCapture, InputStats
from compress.errors import CompressError, UsageError
from compress.structure import Block, decoder_blocks
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
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, eager experts; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eager_experts(model))
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def walk_blocks(
    model: nn.Module, refs: Sequence[WeightRef], batches: Iterable[Tensor | Mapping[str, Tensor]], gram: bool
) -> Iterator[tuple[Block, dict[str, InputStats]]]:
    """Yield each decoder block with the statistics of its matrices in `refs`, by name, up to the last block that has any.

    `batches` are token ids, int64 `[batch, length]`, or the model's keyword arguments. Between two steps the caller may alter
    the yielded block's weights in place: the next block is measured on the outputs of the altered one. Memory holds the hidden
    states of all batches and the statistics of one block.

    Raises UsageError for no batches or for matrices outside the blocks; CompressError when a matrix takes part in no product
    and for models whose blocks cannot be run one after the other.
    """
    blocks = decoder_blocks(model)
    outside = [ref.name for ref in refs if ref.layer is None]
    if outside:
        raise UsageError(f"{', '.join(outside)}: outside the decoder blocks, where calibration block by block does not reach")
    if not refs:
        return
    blocks = blocks[: max(ref.layer for ref in refs if ref.layer is not None) + 1]
    with _measuring(model):
        states, calls = _catch(model, blocks, list(batches))
    for block in blocks:
        here = [ref for ref in refs if ref.layer == block.index]
        stats: dict[str, InputStats] = {}
        if here:
            with _measuring(model), InputCapture(here, gram) as capture:
                for state, call in zip(states, calls, strict=True):
                    call[block.index].run(state)
            if unseen := capture.unseen():
                raise CompressError(
                    f"{', '.join(unseen)}: the model ran without any product with this weight that calibration recognises; exclude it"
                )
            stats = capture.stats()
            del capture
        yield block, stats
        stats = {}
        if block is not blocks[-1]:
            with _measuring(model):
                for i, call in enumerate(calls):
                    states[i] = call[block.index].run(states[i])


@dataclass
class _Call:
    """One call of a block as the model makes it, without the hidden states."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, state: Tensor) -> Tensor:
        """Hidden states in, hidden states out. A copy goes in: some blocks add to their input in place."""
        return _hidden(self.module(state.clone(), *self.args, **self.kwargs))


class _Stop(Exception):
    pass


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _catch(
    model: nn.Module, blocks: list[Block], batches: list[Tensor | Mapping[str, Tensor]]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """The hidden states that enter the first block, and for each batch the other arguments of every block.

    Masks and position embeddings can differ from layer to layer, so the model itself has to call every block. The first batch
    takes a real pass, which shows that the hidden states go straight from block to block. Then the blocks hand on their input
    as it is, so that the passes cost nothing, and the first batch shows again that arguments do not depend on hidden states.
    """
    if not batches:
        raise UsageError("calibration needs at least one batch of tokens")
    _, real, plain = _pass(model, blocks, batches[0], skip=False)
    states, calls = [], []
    for index, batch in enumerate(batches):
        state, call, _ = _pass(model, blocks, batch, skip=plain)
        if index == 0 and not all(_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(real, call, strict=True)):
            raise CompressError(
                f"{type(model).__name__} computes arguments of its blocks from hidden states, so it cannot be calibrated block by block"
            )
        states.append(state)
        calls.append(call)
    return states, calls


def _pass(
    model: nn.Module, blocks: list[Block], batch: Tensor | Mapping[str, Tensor], skip: bool
) -> tuple[Tensor, list[_Call], bool]:
    """One pass up to the last of `blocks`: the first hidden states, the calls, and whether all blocks return a plain tensor.

    With `skip` the blocks return their input.
    """
    entering: list[Tensor] = []
    calls: list[_Call] = []
    outputs: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        entering.append(state)
        calls.append(_Call(module, rest, kwargs))
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
                stack.enter_context(_skipped(module))
        with suppress(_Stop):
            model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
    in_order = [call.module for call in calls] == [block.module for block in blocks]
    if not in_order or not all(_same(_hidden(out), state) for out, state in zip(outputs, entering[1:], strict=False)):
        raise CompressError(
            f"{type(model).__name__} does not run its blocks one straight after the other, so it cannot be calibrated block by block"
        )
    return entering[0], calls, all(isinstance(output, Tensor) for output in outputs)


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _skipped(module: nn.Module) -> Iterator[None]:
    """Let the module return its hidden states unchanged."""
    own = vars(module).get("forward")  # set on the instance by those who wrap a forward, as accelerate does

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


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
