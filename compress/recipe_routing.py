"""What a recipe of `compress learn-routing` may say: which experts of its top k a token runs (`compress.recipe_file` reads it).

Imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.recipe import DataSection, ModelSection, Precision, ScheduleSection, Section, SourceSection, TextSection

RoutingMethod = Literal["otp", "odp", "top-p", "top-k"]


class RoutingCalibrationSection(Section):
    sources: list[SourceSection] = Field(
        [],
        description="Text on which medians are taken and the target activation is met; by default sequences of data.sources that nothing "
        "is learned from. How many experts run depends on the text, so take the kind that the model is to read",
    )
    samples: int = Field(64, gt=0, description="Sequences of it, of data.seqlen tokens")
    batch: int = Field(8, gt=0, description="Sequences a forward pass, here and when activation is measured")


class RouterSection(Section):
    rank: int = Field(32, gt=0, description="Numbers that a token's hidden state is projected to")
    keep_all: float = Field(
        0.95, gt=0.5, lt=1, description="Probability of running every expert that learning starts from, the same for all tokens"
    )


class RoutingLearnSection(Section):
    steps: int = Field(300, ge=0, description="Optimizer steps")
    batch: int = Field(8, gt=0, description="Sequences a step, over all processes and micro-batches")
    micro_batch: int = Field(8, gt=0, description="Sequences a forward pass")
    learning_rate: float = Field(5e-3, gt=0, description="Peak learning rate of the routers (AdamW)")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that ramps the learning rate up")
    final_rate: float = Field(0.05, ge=0, le=1, description="The cosine ends at this share of the peak")
    weight_decay: float = Field(0.0, ge=0, description="AdamW")
    clip: float = Field(1.0, ge=0, description="Clip the gradient to this norm; 0 does not clip")
    temperature: ScheduleSection = Field(
        ScheduleSection(start=2.0, end=0.5, curve="exponential"), description="Gumbel-softmax temperature"
    )
    sparsity: float | None = Field(
        None,
        gt=0,
        description="Weight of the sparsity term, in nats: the divergence that running no expert beyond the first would be worth. null "
        "finds it by dual ascent, so that target_activation is met",
    )
    dual_start: float = Field(0.05, gt=0, description="Lagrange multiplier that dual ascent starts from, in nats")
    dual_rate: float = Field(
        0.5, gt=0, description="Dual ascent: the multiplier's relative change a step and unit of excess activation"
    )
    approach: float = Field(
        0.3, ge=0, lt=1, description="Share of the steps over which the target falls from 1 to target_activation"
    )
    precision: Precision = Field(
        "auto",
        description="Precision of the frozen model's products; routers stay in fp32. auto is bf16 where the device has instructions for it, "
        "else fp32",
    )
    checkpoint_activations: bool = Field(
        False,
        description="Keep only what enters each block and compute the block again in the backward pass: slower, far less memory",
    )
    save_minutes: float = Field(10.0, gt=0, description="Write a checkpoint this often")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> RoutingLearnSection:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        return self


class RoutingEvaluateSection(Section):
    texts: dict[str, TextSection] = Field(
        {},
        description="Measured at the end, by name, one a domain: perplexity, divergence from the unpruned model, experts a token",
    )
    baselines: list[Literal["odp", "top-p", "top-k"]] = Field(
        [],
        description="Rules measured beside the routing: odp and top-p at the activation that it has on the calibration text, top-k with "
        "the next larger and the next smaller number of experts",
    )


class LearnRoutingRecipe(Section):
    """Skip experts for each token (`compress learn-routing`)."""

    recipe: Literal["learn-routing"] = Field(description="What this recipe drives")
    description: str = Field("", description="One line for `compress recipes ls`")
    model: ModelSection
    method: RoutingMethod = Field(
        "otp",
        description="otp: a learned router (MC#). odp: the ratio to the largest routing weight against a threshold a layer and rank (MC). "
        "top-p: as few experts as hold a share of the routing weight. top-k: the same number for every token",
    )
    target_activation: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Average share of the routed experts that run, met on the calibration text: at least one of the model's top k, so not "
        "below 1 / k. null: odp takes the medians themselves, otp what learn.sparsity gives",
    )
    keep: int | None = Field(None, gt=0, description="top-k: experts that run for every token")
    protect: float = Field(
        0.02, ge=0, lt=1, description="odp: share of the tokens of a sequence, the most important ones, that run every expert"
    )
    data: DataSection
    calibration: RoutingCalibrationSection = RoutingCalibrationSection()
    router: RouterSection = RouterSection()
    learn: RoutingLearnSection = RoutingLearnSection()
    evaluate: RoutingEvaluateSection = RoutingEvaluateSection()
    seed: int = Field(0, ge=0, description="Of the order of the text, the routers' start and the Gumbel noise")

    @model_validator(mode="after")
    def _amount(self) -> LearnRoutingRecipe:
        if (self.keep is None) == (self.method == "top-k"):
            raise ValueError("method top-k needs keep, the number of experts that run, and no other method takes it")
        if self.method == "top-k" and self.target_activation is not None:
            raise ValueError("method top-k runs keep experts for every token; it has no target_activation")
        if self.method == "top-p" and self.target_activation is None:
            raise ValueError("method top-p needs target_activation")
        if self.method == "otp" and (self.target_activation is None) == (self.learn.sparsity is None):
            raise ValueError("method otp needs either target_activation or learn.sparsity, a weight")
        return self
