"""`--dry-run`: what a run would do, from the model's config alone; nothing is loaded and nothing is written."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.device import pick_device
from compress.errors import UsageError
from compress.memory import MemoryModel, Stage
from compress.models import meta_model
from compress.recipe import LearnMaskRecipe
from compress.settings import settled
from compress.weights import by_parameter, find_weights
from maskllm.patterns import Pattern

_MASK_SECONDS = 5e-9  # a weight and a step, forward and backward of the soft mask on two AVX-512 cores, measured


@dataclass(frozen=True)
class Plan:
    """`matrices` maps a kind of matrix (numbers as *) to how many there are and their shape.

    steps, tokens: of learning end to end; block_steps, block_tokens: of learning block by block, over all blocks.
    stages: what each stage holds at its fullest moment, in bytes (`compress.memory`). seconds: an estimate of the learning alone,
    from the speed of a matrix product on this machine in `precision`. processes: how many learn together; the bytes are those of the
    first, which holds most.
    """

    model: str
    pattern: str
    weights: int
    matrices: dict[str, tuple[int, tuple[int, int]]]
    steps: int
    tokens: int
    block_steps: int
    block_tokens: int
    stages: list[Stage]
    seconds: float
    device: str
    precision: str
    processes: int

    @property
    def peak(self) -> Stage:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        stages = [{"name": s.name, "bytes": s.total, "parts": s.parts} for s in self.stages]
        return asdict(self) | {"stages": stages, "bytes_peak": self.peak.total, "peak": self.peak.name}

    def describe(self) -> str:
        """The plan as text."""
        lines = [f"{self.model}: {self.weights:,} weights to mask {self.pattern}, in"]
        lines += [f"  {count:5d} x {list(shape)!s:14} {kind}" for kind, (count, shape) in self.matrices.items()]
        if self.block_steps:
            lines.append(f"{self.block_steps} steps block by block, {self.block_tokens:,} tokens")
        if self.steps:
            lines.append(f"{self.steps} steps end to end, {self.tokens:,} tokens")
        time_needed = f"{self.seconds / 3600:.1f} hours" if self.seconds > 7200 else f"{self.seconds / 60:.0f} minutes"
        lines.append(f"about {time_needed} of learning on this machine ({self.device}, products in {self.precision})")
        place = "GPU" if self.device == "cuda" else "process"
        place += f" (the first of {self.processes})" if self.processes > 1 else ""
        lines.append(f"memory of the {place}, in bytes, at the fullest moment of each stage:")
        for stage in self.stages:
            lines.append(f"  {stage.total:16,}  {stage.name}{' (the peak)' if stage is self.peak else ''}")
            lines += [f"      {size:16,}  {holder}" for holder, size in sorted(stage.parts.items(), key=lambda p: -p[1])]
        return "\n".join(lines)


def plan(recipe: LearnMaskRecipe, processes: int = 1) -> Plan:
    """What `recipe` would do on this machine, launched in so many processes.

    The time takes it that each process has a GPU of its own, or that they share this machine's CPUs.

    Raises what a real run would (patterns that match nothing, shapes that M does not divide), and CompressError for a model whose memory
    cannot be planned.
    """
    recipe = settled(recipe)
    pattern = Pattern.parse(recipe.pattern)
    model = meta_model(recipe.model.source, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
    refs = find_weights(model, recipe.weights.include, recipe.weights.exclude)
    parameters = by_parameter(refs)
    if processes > 1 and recipe.learn.scope != "model":
        raise UsageError(f"learn.scope: {recipe.learn.scope} runs in one process, not in {processes}")
    matrices: dict[str, tuple[int, tuple[int, int]]] = {}
    for ref in refs:
        pattern.check_divides(ref.shape[1], ref.name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", ref.name)
        matrices[kind] = (matrices.get(kind, (0, ref.shape))[0] + 1, ref.shape)
    weights = sum(ref.shape[0] * ref.shape[1] for ref in refs)
    total = sum(p.numel() for p in model.parameters())
    learn, block = recipe.learn, recipe.learn.block
    device = pick_device(recipe.model.device)
    stages = MemoryModel(recipe, model, refs, parameters, device, processes).stages()
    blocks = len({p.layer for p in parameters}) if learn.scope != "model" else 0
    steps, block_steps = learn.steps if learn.scope != "block" else 0, blocks * block.steps
    tokens = steps * learn.batch * recipe.data.seqlen
    block_tokens = block_steps * block.batch * (block.seqlen or recipe.data.seqlen)
    # A forward pass and two of backward; the teacher's and the recomputed. A step of a block sees only that block's weights.
    passes = 3 + (learn.distillation > 0) + learn.checkpoint_activations
    products = 2 * (passes * total * tokens + (3 * weights * block_tokens // blocks if blocks else 0))
    masks = weights * (steps + (block.steps if blocks else 0)) * _MASK_SECONDS * (1 if device.type == "cpu" else 0.02)
    return Plan(
        model=recipe.model.source,
        pattern=recipe.pattern,
        weights=weights,
        matrices=matrices,
        steps=steps,
        tokens=tokens,
        block_steps=block_steps,
        block_tokens=block_tokens,
        stages=stages,
        seconds=(products / _matmul_rate(learn.precision == "bf16", device.type) + masks)
        / (processes if device.type == "cuda" else 1),
        device=device.type,
        precision=learn.precision,
        processes=processes,
    )


def _matmul_rate(bf16: bool, device: str) -> float:
    """Operations a second of a product as large as a small model's, measured now; half of that is what a whole network reaches."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = torch.randn(1024, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)

    def timed(rows: int, runs: int) -> float:
        began = time.perf_counter()
        for _ in range(runs):
            a[:rows] @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    # A type without instructions takes half a minute for what others do in an instant: then the first eighth says enough.
    rows, runs = (1024, 8) if timed(128, 1) < 0.15 else (128, 1)
    return 0.5 * runs * 2 * rows * 1024**2 / timed(rows, runs)
