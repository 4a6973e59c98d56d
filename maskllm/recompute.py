"""Activation checkpointing of a network's blocks: keep what enters a block, compute the block again when its gradient is due.

(Chen et al., arXiv 1604.06174.) Between the forward and the backward pass only the hidden states between blocks live, and of the
masked weights, which autograd keeps for every product, only those of the block at work. A recomputation gives the same bits
because nothing in it is random but the masks' noise, which is counter-based, and the network is in evaluation mode.

Transformers' own switch acts in training mode only, which would also turn dropout on; wrapping `forward` works in any mode and
for any module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> Callable[[], None]:
    """Let every block recompute its activations in the backward pass, and make each of its masks once a pass.

    Without gradients the blocks run as they did, but still make each mask once. Returns what undoes it.
    """
    return wrap_forward(blocks, _recomputed)


def wrap_forward(modules: Iterable[nn.Module], wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Let `wrapper(forward, *args, **kwargs)` stand for the forward of every module. Returns what undoes it."""
    replaced: list[tuple[nn.Module, Any]] = []
    for module in {id(m): m for m in modules}.values():
        own = vars(module).get("forward")  # set on the instance by those who wrap a forward, as accelerate does
        replaced.append((module, own))
        module.__dict__["forward"] = functools.partial(wrapper, module.forward)

    def release() -> None:
        for module, own in replaced:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own

    return release


def _recomputed(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(_once, plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return _once(plain, *args, **kwargs)


def _once(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Fused experts read their weight once an expert; within a block the masked weight is made once and dropped at its end."""
    with parametrize.cached():
        return plain(*args, **kwargs)
