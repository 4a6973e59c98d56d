"""`--dry-run`: what a run would do, from the model's config alone; nothing is loaded and nothing is written."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.models import meta_model
from compress.recipe import LearnMaskRecipe
from compress.weights import by_parameter, find_weights
from maskllm.gumbel import logit_width
from maskllm.patterns import Pattern

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MASK_SECONDS = 5e-9  # a weight and a step, forward and backward of the soft mask on two AVX-512 cores, measured


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds are estimates; `matrices` maps a kind of matrix (numbers as *) to how many there are and their shape."""

    model: str
    pattern: str
    weights: int
    matrices: dict[str, tuple[int, tuple[int, int]]]
    steps: int
    tokens: int
    bytes_model: int
    bytes_learning: int
    bytes_activations: int
    seconds: float
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def describe(self) -> str:
        """The plan as text."""
        gib = 2.0**30
        lines = [f"{self.model}: {self.weights:,} weights to mask {self.pattern}, in"]
        lines += [f"  {count:5d} x {list(shape)!s:14} {kind}" for kind, (count, shape) in self.matrices.items()]
        lines += [
            f"{self.steps} steps, {self.tokens:,} tokens, about {self.seconds / 60:.0f} minutes of learning on this machine ({self.device})",
            f"memory: {self.bytes_model / gib:.2f} GiB model, {self.bytes_learning / gib:.2f} GiB logits and optimizer, "
            f"about {self.bytes_activations / gib:.2f} GiB activations",
        ]
        return "\n".join(lines)


def plan(recipe: LearnMaskRecipe) -> Plan:
    """What `recipe` would do on this machine. Raises what a real run would: patterns that match nothing, shapes that M does not divide."""
    pattern = Pattern.parse(recipe.pattern)
    model = meta_model(recipe.model.source, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
    refs = find_weights(model, recipe.weights.include, recipe.weights.exclude)
    by_parameter(refs)
    matrices: dict[str, tuple[int, tuple[int, int]]] = {}
    for ref in refs:
        pattern.check_divides(ref.shape[1], ref.name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", ref.name)
        matrices[kind] = (matrices.get(kind, (0, ref.shape))[0] + 1, ref.shape)
    weights = sum(ref.shape[0] * ref.shape[1] for ref in refs)
    parameters = sum(p.numel() for p in model.parameters())
    learn, tokens_step = recipe.learn, recipe.learn.batch * recipe.data.seqlen
    size = _BYTES.get(recipe.model.dtype) or torch.empty((), dtype=model.dtype).element_size()
    width = logit_width(pattern, learn.parametrization)
    micro = learn.micro_batch * recipe.data.seqlen
    config = model.config.get_text_config()
    # Of a block, autograd keeps about 16 hidden states and 4 of the feed-forward's; of the head, logits of student and teacher.
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    kept = config.num_hidden_layers * (16 * hidden + 4 * inner) * 2 + 3 * config.vocab_size * 2
    passes = 3 if learn.distillation == 0 else 4  # forward, two of backward, and the teacher's forward
    rate, device = _matmul_rate(learn.precision == "bf16")
    compute = 2 * passes * parameters * tokens_step / rate
    return Plan(
        model=recipe.model.source,
        pattern=recipe.pattern,
        weights=weights,
        matrices=matrices,
        steps=learn.steps,
        tokens=learn.steps * tokens_step,
        bytes_model=parameters * size,
        bytes_learning=weights // pattern.m * width * 4 * 4,
        bytes_activations=micro * kept + weights * (2 if learn.precision == "bf16" else 4),
        seconds=learn.steps * (compute + weights * _MASK_SECONDS * (1 if device == "cpu" else 0.02)),
        device=device,
    )


def _matmul_rate(bf16: bool) -> tuple[float, str]:
    """Operations a second of a product as large as a small model's, measured now; half of that is what a whole network reaches."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = torch.randn(1024, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)
    a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    began, runs = time.perf_counter(), 8
    for _ in range(runs):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    return 0.5 * runs * 2 * 1024**3 / (time.perf_counter() - began), device
