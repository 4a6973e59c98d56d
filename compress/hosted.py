"""A model whose decoder blocks stay in the host's memory and come to the accelerator when they run.

Where several processes share the frozen weights out (`learn.shard: weights`), no accelerator is taken to hold them all. Before they are
shared out, a run prunes and measures the whole model all the same: one block of it is on the accelerator at a time, beside what is no part of
a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.structure import decoder_blocks
from maskllm.recompute import wrap_forward


class HostedBlocks:
    """The decoder blocks of `model`, which is on the CPU; everything outside of them moves to `device` for good.

    While a block runs, copies of its parameters and buffers on the device are in their places. What is written into those is lost: work on a
    block's weights moves the block itself (`compress.walk.placed`), which this leaves alone.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        device = torch.empty(0, device=device).device  # with its number
        blocks = list({id(block.module): block.module for block in decoder_blocks(model)}.values())
        inside = {id(module) for block in blocks for module in block.modules()}
        _move([slot for module in model.modules() if id(module) not in inside for slot in _slots(module)], device)
        self._released = [wrap_forward([block], functools.partial(_visiting, block, device)) for block in blocks]

    def close(self) -> None:
        """Let the blocks run where they are."""
        for release in self._released:
            release()
        self._released = []


@dataclass(frozen=True)
class _Slot:
    """Where a module keeps a parameter or buffer."""

    tensors: dict[str, Any]
    name: str


def _slots(module: nn.Module) -> list[_Slot]:
    """Of the module itself."""
    kept: list[dict[str, Any]] = [module._parameters, module._buffers]
    return [_Slot(tensors, name) for tensors in kept for name, tensor in tensors.items() if tensor is not None]


def _move(slots: list[_Slot], device: torch.device) -> list[tuple[_Slot, Tensor]]:
    """Put copies on `device` into the slots; those that share a tensor share its copy. Returns what was in slots that were elsewhere."""
    copies: dict[int, Tensor] = {}
    before: list[tuple[_Slot, Tensor]] = []
    for slot in slots:
        tensor: Tensor = slot.tensors[slot.name]
        if tensor.device == device:
            continue
        before.append((slot, tensor))
        if id(tensor) not in copies:
            copy = tensor.detach().to(device)
            parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if parameter else copy
        slot.tensors[slot.name] = copies[id(tensor)]
    return before


def _visiting(block: nn.Module, device: torch.device, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = _move([slot for module in block.modules() for slot in _slots(module)], device)
    try:
        return forward(*args, **kwargs)
    finally:
        for slot, tensor in before:
            slot.tensors[slot.name] = tensor
