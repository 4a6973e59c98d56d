"""`compress learn-routing --dry-run`: what a run would do, from the model's config alone; nothing is loaded and nothing is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress.device import dtype_on, pick_device
from compress.errors import UsageError
from compress.models import meta_model
from compress.recipe_routing import LearnRoutingRecipe
from compress.routing.decisions import make_decision
from compress.routing.mixtures import Mixture, expert_modules
from compress.routing.rules import check_target
from compress.settings import settled
from compress.structure import text_config


@dataclass(frozen=True)
class RoutingPlan:
    """mixtures, experts, top_k: of the model. learned: numbers of all routers (0 for a rule). tokens: learned from. model_bytes: frozen weights.

    hidden_bytes: what is kept of hidden states between the passes of one step, if activations are recomputed: micro_batch x length x hidden
    a layer, in the model's type.
    """

    model: str
    method: str
    mixtures: int
    experts: int
    top_k: int
    learned: int
    steps: int
    tokens: int
    calibration_tokens: int
    model_bytes: int
    hidden_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def describe(self) -> str:
        """The plan as text."""
        lines = [f"{self.model}: {self.mixtures} mixtures, {self.top_k} of {self.experts} experts a token, method {self.method}"]
        if self.learned:
            lines.append(f"{self.learned:,} numbers to learn in {self.steps} steps, {self.tokens:,} tokens")
        lines.append(f"{self.calibration_tokens:,} tokens to calibrate on")
        lines.append(
            f"{self.model_bytes:,} bytes of frozen weights; {self.hidden_bytes:,} bytes of hidden states between layers in a step"
        )
        return "\n".join(lines)


def plan_routing(recipe: LearnRoutingRecipe) -> RoutingPlan:
    """What `recipe` would do. Raises what a real run would for a model without mixtures, and for a target that cannot be met."""
    recipe = settled(recipe)
    wanted = recipe.model
    model = meta_model(wanted.source, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
    found = expert_modules(model)
    config = text_config(model)
    top_k = next(
        (getattr(config, key) for key in ("num_experts_per_tok", "top_k_experts", "moe_topk") if hasattr(config, key)), None
    )
    if top_k is None:
        raise UsageError(
            f"the configuration of {wanted.source} does not say how many experts a token runs; start the run without --dry-run"
        )
    if recipe.target_activation is not None:
        check_target(recipe.target_activation, top_k)
    learned = 0
    experts = 0
    for name, module, block in found:
        count: Any = module.num_experts
        experts = int(count)
        if recipe.method == "otp":
            mixture = Mixture(name, module, block, experts, top_k, config.hidden_size, False)
            router = make_decision("otp", mixture, rank=recipe.router.rank)
            learned += sum(parameter.numel() for parameter in router.parameters())
    kind = dtype_on(pick_device(wanted.device), wanted.dtype)
    sizes = [kind.itemsize if kind else p.element_size() for p in model.parameters()]
    learn, length = recipe.learn, recipe.data.seqlen
    return RoutingPlan(
        model=wanted.source,
        method=recipe.method,
        mixtures=len(found),
        experts=experts,
        top_k=top_k,
        learned=learned,
        steps=learn.steps if learned else 0,
        tokens=learn.steps * learn.batch * length if learned else 0,
        calibration_tokens=recipe.calibration.samples * length,
        model_bytes=sum(p.numel() * size for p, size in zip(model.parameters(), sizes, strict=True)),
        hidden_bytes=learn.micro_batch * length * config.hidden_size * sizes[0] * config.num_hidden_layers,
    )
