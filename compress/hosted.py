"""A model whose decoder blocks stay in the host's memory and come to the accelerator when they run.

Where several processes share the frozen weights out (`learn.shard: weights`), no accelerator is taken to hold them all. Before they are
shared out, a run prunes and measures the whole model all the same: one block of it is on the accelerator at a time, beside what is no part of
a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compress.structure import decoder_blocks
from maskllm.recompute import wrap_forward


class HostedBlocks:
    """The decoder blocks of `model`, which is on the CPU; everything outside of them moves to `device` for good.

    While a block runs, its parameters and buffers are on the device. What is written into them then is lost: work on a block's weights
    moves the block itself (`compress.walk.placed`), which this leaves alone.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        blocks = list({id(block.module): block.module for block in decoder_blocks(model)}.values())
        inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
        for tensor in _tensors(model):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)
        self._released = [wrap_forward([block], functools.partial(_visiting, block, device)) for block in blocks]

    def close(self) -> None:
        """Let the blocks run where they are."""
        for release in self._released:
            release()
        self._released = []


def _visiting(block: nn.Module, device: torch.device, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    away = [(tensor, tensor.data) for tensor in _tensors(block) if tensor.device != device]
    for tensor, data in away:
        tensor.data = data.to(device)
    try:
        return forward(*args, **kwargs)
    finally:
        for tensor, data in away:  # unchanged, so nothing is copied back
            tensor.data = data


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those that modules share once."""
    return chain(module.parameters(), module.buffers())
