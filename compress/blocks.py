"""`learn.scope: block`: learn the masks of one decoder block after the other, each from hidden states that are kept.

For block f_k the dense model's hidden states are d_(k+1) = f_k(d_k), those of the masked blocks p_(k+1) = f_k^m(p_k), with p_0 = d_0.
`prefix: dense` learns f_k^m(d_k) ~ d_(k+1), `prefix: pruned` learns f_k^m(p_k) ~ d_(k+1). The target is the dense model's state in both:
the distance that is then small is the very one that the next block meets, so a block can make good what the blocks before it
spoiled. (With f_k(p_k) as the target, each block would be true to itself and the distances would add up.)

What is in memory: two hidden states a token, and the logits and optimizer of one block. Nothing of a block is kept but its mask, so a run
that continues sends its sequences through the finished blocks again, a forward pass or two for each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import console
from compress.activations import Activations, scratch_folder
from compress.capture import InputCapture
from compress.device import pick_device
from compress.errors import CompressError
from compress.experts import starved_parts, tokens_by_expert
from compress.interrupt import Interrupted, StopFlag
from compress.rundir import RunDir
from compress.session import Session
from compress.settings import block_settings
from compress.structure import Block, decoder_blocks
from compress.walk import BlockCall, catch_calls, check_inside, evaluating, measuring, placed
from compress.weights import ParameterRef
from compress_kernels.gumbel import stream_key
from maskllm.blockwise import BlockLearner, BlockResult, applied
from maskllm.checkpoint import Checkpoint, CheckpointStore
from maskllm.optim import logit_dtype
from maskllm.storage import difference, pack_mask, unpack_mask

_MASK = "mask/"  # before the name of a parameter, in checkpoints
_KINDS = ("block", "block-step")  # of lines in metrics.jsonl; their `step` counts on from block to block


def learn_blocks(
    session: Session, run: RunDir, prior: dict[str, Tensor], stop: StopFlag, resume_command: str
) -> dict[str, Tensor]:
    """Learn every block of a run, or what is left of it; returns the masks, of the parameters' shapes, on the CPU.

    Writes a line a step and a line a block to metrics.jsonl. Raises UsageError for weights outside the blocks, Interrupted when a
    stop was asked for (the state is saved), and what `catch_calls` and `BlockLearner` raise.
    """
    stage = _Stage(session, run, prior, stop, resume_command)
    stage.resume()
    if stage.finished < len(stage.learned):
        folder = run.state / "activations"
        with evaluating(session.loaded.model), scratch_folder(folder, stage.section.cache) as scratch:
            stage.walk(scratch)
    return {p.name: stage.mask(p) for p in session.parameters}


@dataclass
class _States:
    """What enters the current block and what it should put out, a tensor `[micro_batch, length, hidden]` a micro-batch."""

    inputs: Activations
    outputs: Activations
    calls: list[list[BlockCall]]  # of each micro-batch, of each block


@dataclass
class _Stage:
    session: Session
    run: RunDir
    prior: dict[str, Tensor]
    stop: StopFlag
    resume_command: str
    packed: dict[str, Tensor] = field(default_factory=dict)  # masks of the finished blocks, by `pack_mask`

    def __post_init__(self) -> None:
        recipe, model = self.session.recipe, self.session.loaded.model
        check_inside(self.session.refs)
        self.section = recipe.learn.block
        self.settings = block_settings(recipe.learn, recipe.seed)
        layers = {p.layer for p in self.session.parameters}
        blocks = decoder_blocks(model)
        self.learned = [block.index for block in blocks if block.index in layers]
        self.blocks = blocks[: self.learned[-1] + 1]
        self.device = pick_device(self.section.device) if self.section.device else model.device
        self.store = CheckpointStore(self.run.state / "blocks", self.session.identity)
        self.loaded: Checkpoint | None = None
        model.requires_grad_(False)

    @property
    def finished(self) -> int:
        """How many of the blocks to learn have their masks."""
        return sum(self._of(index)[0].name in self.packed for index in self.learned)

    def _of(self, layer: int) -> list[ParameterRef]:
        return [p for p in self.session.parameters if p.layer == layer]

    def mask(self, p: ParameterRef) -> Tensor:
        """The mask of a parameter in a finished block: bool, of its shape."""
        shape = self.prior[p.name].movedim(p.contracted_dim, -1).shape
        return unpack_mask(self.packed[p.name], self.session.pattern, shape).movedim(-1, p.contracted_dim)

    def resume(self) -> None:
        """Take what the newest checkpoint holds, and forget what was recorded behind it."""
        self.loaded = self.store.load()
        done = self.loaded.step if self.loaded else 0
        if self.loaded:
            masks = {key: value for key, value in self.loaded.tensors.items() if key.startswith(_MASK)}
            self.packed = {key.removeprefix(_MASK): value for key, value in masks.items()}
        self.run.rewind_metrics(done, _KINDS)
        if done and self.finished < len(self.learned):
            console.log.print(f"continuing in block {self.learned[self.finished]} after {done % self.settings.steps} steps")

    def save(self, step: int, learning: dict[str, Tensor]) -> None:
        """Write a checkpoint: the masks of the finished blocks, and the state of the one that is being learned."""
        self.store.save(step, {_MASK + name: packed for name, packed in self.packed.items()} | learning)

    def walk(self, scratch: Path | None) -> None:
        """Go through the blocks from the first on; learn those that are not finished."""
        steps = self.settings.steps
        with console.task("learning block by block", len(self.learned) * steps, self.finished * steps) as bar:
            states = self._enter(scratch)
            for block in self.blocks:
                with placed(block.module, self.device):
                    calls = _on_device([call[block.index] for call in states.calls], self.device)
                    seen = self._dense_pass(block, states, calls)
                    if block.index in self.learned[self.finished :]:
                        self._learn(block, states, calls, seen, bar)
                    if block is not self.blocks[-1] and self.section.prefix == "pruned":
                        self._masked_pass(block, states, calls)
                if self.section.prefix == "dense":
                    states.inputs, states.outputs = states.outputs, states.inputs

    def _enter(self, scratch: Path | None) -> _States:
        """The hidden states that enter the first block."""
        model, batches = self.session.loaded.model, self.session.block_batches
        arrays: list[Activations] = []
        calls = []
        with measuring(model):
            for i, (state, call) in enumerate(catch_calls(model, self.blocks, batches)):
                if not arrays:
                    files = [scratch / name if scratch else None for name in ("inputs", "outputs")]
                    arrays = [Activations(len(batches), state.shape, state.dtype, file) for file in files]
                for array in arrays:
                    array[i] = state
                calls.append(call)
        return _States(arrays[0], arrays[1], calls)

    def _dense_pass(self, block: Block, states: _States, calls: list[BlockCall]) -> dict[str, int]:
        """Let `outputs` be what the dense block makes of the dense model's states; returns the tokens each matrix of an expert saw."""
        before = states.inputs if self.section.prefix == "dense" else states.outputs
        experts = [ref for ref in self.session.refs if ref.layer == block.index and ref.expert is not None]
        with measuring(self.session.loaded.model), InputCapture(experts, gram=False) as capture:
            for i, call in enumerate(calls):
                states.outputs[i] = call.run(before[i].to(self.device))
        if unseen := capture.unseen():
            raise CompressError(
                f"{', '.join(unseen)}: the model ran without any product with this weight that is recognised; exclude it"
            )
        return {name: stats.tokens for name, stats in capture.stats().items()}

    def _masked_pass(self, block: Block, states: _States, calls: list[BlockCall]) -> None:
        """Let `inputs` be what the block with its masks puts out. (A module that several layers share has them in each.)"""
        modules = set(block.module.modules())
        here = [p for p in self.session.parameters if p.module in modules and p.name in self.packed]
        with measuring(self.session.loaded.model), applied(self.session.targets(here), {p.name: self.mask(p) for p in here}):
            for i, call in enumerate(calls):
                states.inputs[i] = call.run(states.inputs[i].to(self.device))

    def _learn(self, block: Block, states: _States, calls: list[BlockCall], seen: dict[str, int], bar: console.Task) -> None:
        here, steps, began = self._of(block.index), self.settings.steps, time.monotonic()
        first, seed = self.finished * steps, stream_key(self.session.recipe.seed, block.index)
        prior = {p.name: self.prior[p.name] for p in here}
        frozen, starved = starved_parts(here, seen, self.section.min_tokens)
        learner = BlockLearner(
            lambda i, x: calls[i].run(x),
            self.session.targets(here),
            self.session.pattern,
            dataclasses.replace(self.settings, seed=seed),
            self.section.objective,
            states.inputs,
            states.outputs,
            self.section.held_out // self.section.micro_batch,
            self.session.start_logits(self.prior, here, seed >> 1, logit_dtype(self.settings.state)),
            prior,
            frozen,
        )
        try:
            if self.loaded and self.loaded.step > first:
                learner.load(self.loaded.step - first, self.loaded.tensors)
            self.loaded = None
            self._steps(learner, block, first, bar)
            result = learner.finish()
        finally:
            learner.close()
        for p in here:
            self.packed[p.name] = pack_mask(result.masks[p.name].movedim(p.contracted_dim, -1), self.session.pattern)
        counts = difference(result.masks, prior, self.session.pattern, self.session.contracted).values()
        flipped = sum(a for a, _ in counts), sum(b for _, b in counts)
        self._record(block, first + steps, result, flipped, time.monotonic() - began, seen, starved)
        self.save(first + steps, {})

    def _steps(self, learner: BlockLearner, block: Block, first: int, bar: console.Task) -> None:
        saved = time.monotonic()
        for record in learner.steps():
            step, last = first + record.step, record.step == self.settings.steps
            self.run.append_metric({"kind": "block-step", "block": block.index, **dataclasses.asdict(record), "step": step})
            bar.update(step, f"block {block.index} loss {record.loss:.4f}")
            if last:
                return  # what is learned is saved once it is decided upon
            if self.stop.asked or time.monotonic() - saved > 60 * self.session.recipe.learn.save_minutes:
                self.save(step, learner.tensors())
                saved = time.monotonic()
            if self.stop.asked:
                raise Interrupted(
                    f"stopped in block {block.index} after {record.step} of {self.settings.steps} steps; the state is saved. "
                    f"Continue with:\n  {self.resume_command}"
                )

    def _record(
        self,
        block: Block,
        step: int,
        result: BlockResult,
        flipped: tuple[int, int],
        seconds: float,
        seen: dict[str, int],
        starved: Sequence[str],
    ) -> None:
        objective = self.section.objective
        line: dict[str, Any] = {
            "kind": "block",
            "step": step,
            "block": block.index,
            "improved": result.improved,
            "error_before": result.before.by(objective),
            "error_after": result.after.by(objective),
            "before": dataclasses.asdict(result.before),
            "after": dataclasses.asdict(result.after),
            "flipped": flipped[0] / flipped[1],
            "seconds": seconds,
        }
        if seen:
            line |= {"expert_tokens": tokens_by_expert(self.session.refs, seen), "starved": list(starved)}
        self.run.append_metric(line)
        verdict = (
            f"{100 * flipped[0] / flipped[1]:.2f} % of the groups flipped" if result.improved else "no better, keeps its prior"
        )
        console.log.print(
            f"block {block.index}: held-out error {line['error_before']:.5f} -> {line['error_after']:.5f}, {verdict}"
        )
        if starved:
            console.log.print(
                f"[yellow]block {block.index}: {len(starved)} experts' matrices saw fewer than {self.section.min_tokens} tokens and keep "
                f"their prior: {', '.join(starved[:4])}{' ...' if len(starved) > 4 else ''}[/]"
            )


def _on_device(calls: list[BlockCall], device: torch.device) -> list[BlockCall]:
    """The calls with their tensors on a device; what several share is moved once."""
    moved = {id(call): call.to(device) for call in {id(call): call for call in calls}.values()}
    return [moved[id(call)] for call in calls]
