"""Calibration block by block: every block is measured on what the already altered blocks before it put out.

This is the layer-sequential calibration of SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) and Wanda (Sun et al. 2023,
arXiv 2306.11695). What is measured of a block is `compress.capture`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from compress.capture import InputCapture, InputStats
from compress.errors import CompressError
from compress.structure import Block, decoder_blocks
from compress.walk import catch_calls, check_inside, measuring, placed
from compress.weights import WeightRef


def walk_blocks(
    model: nn.Module, refs: Sequence[WeightRef], batches: Iterable[Tensor | Mapping[str, Tensor]], gram: bool
) -> Iterator[tuple[Block, dict[str, InputStats]]]:
    """Yield each decoder block with the statistics of its matrices in `refs`, by name, up to the last block that has any.

    `batches` are token ids, int64 `[batch, length]`, or the model's keyword arguments. Between two steps the caller may alter
    the yielded block's weights in place: the next block is measured on the outputs of the altered one. Memory holds the hidden
    states of all batches and the statistics of one block. A block that is elsewhere than the hidden states is with them until the next step.

    Raises UsageError for no batches or for matrices outside the blocks; CompressError when a matrix takes part in no product
    and for models whose blocks cannot be run one after the other.
    """
    blocks = decoder_blocks(model)
    check_inside(refs)
    if not refs:
        return
    blocks = blocks[: max(ref.layer for ref in refs if ref.layer is not None) + 1]
    with measuring(model):
        caught = list(catch_calls(model, blocks, list(batches)))
    states, calls = [state for state, _ in caught], [call for _, call in caught]
    del caught
    for block in blocks:
        here = [ref for ref in refs if ref.layer == block.index]
        stats: dict[str, InputStats] = {}
        with placed(block.module, states[0].device):
            if here:
                with measuring(model), InputCapture(here, gram) as capture:
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
                with measuring(model):
                    for i, call in enumerate(calls):
                        states[i] = call[block.index].run(states[i])
