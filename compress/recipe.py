"""What a recipe may say: the schema of the YAML files that drive the tool (`compress.recipe_file` reads them).

Every key has a type, a default and a description; unknown keys are errors. `compress schema` prints the whole as JSON Schema. This module
imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Method = Literal["magnitude", "wanda", "ria", "sparsegpt"]
Baseline = Literal["dense", "magnitude", "wanda", "ria", "sparsegpt", "sparsegpt-update", "prior"]
CurveName = Literal["linear", "exponential", "cosine", "constant"]
Precision = Literal["auto", "bf16", "fp32"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    source: str = Field(description="Hub name, folder, .gguf file, or asset:tiny-llama / asset:tiny-moe")
    dtype: Literal["auto", "fastest", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the frozen weights in memory: auto is the checkpoint's own, fastest is bfloat16 where the device has instructions for "
        "its products, else float32",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="Run model code from the hub; off unless you know the author")
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1, mps")


class WeightsSection(Section):
    include: list[str] = Field(
        ["*"], min_length=1, description="Globs over weight names; the default is every matrix of the decoder blocks"
    )
    exclude: list[str] = Field([], description="Globs of weights to leave dense; each must match something")


class SourceSection(Section):
    """One text: a local path or a hub data set."""

    path: str | None = Field(
        None, description="asset:NAME, or a .txt, .jsonl, .json or .parquet file, a glob or a folder of them"
    )
    dataset: str | None = Field(None, description="Hub data set, for example allenai/c4")
    name: str | None = Field(None, description="Configuration of the data set, for example en")
    split: str = Field("train", description="Split of the data set")
    field: str = Field("text", description="Field that holds the text")
    span: tuple[float, float] = Field(
        (0.0, 1.0), description="Part to use, as fractions: of the characters of a .txt file, else of the documents"
    )
    streaming: bool = Field(False, description="Read the data set as a stream, without downloading it whole")
    documents: int | None = Field(None, gt=0, description="Read at most this many documents")
    weight: float = Field(1.0, gt=0, description="Share of the tokens relative to the other sources")

    @model_validator(mode="after")
    def _one_place(self) -> SourceSection:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path (a local text) or dataset (a hub data set)")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span {list(self.span)} is not a part: it needs 0 <= start < end <= 1")
        return self


class DataSection(Section):
    sources: list[SourceSection] = Field(min_length=1, description="Texts for calibration and training")
    seqlen: int = Field(512, gt=1, description="Tokens a training sequence")
    max_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokenise at most this many tokens; null reads as many as the run needs from a stream, everything from a file",
    )


class CalibrationSection(Section):
    samples: int = Field(128, gt=0, description="Sequences that one-shot methods see")
    seqlen: int | None = Field(None, gt=1, description="Tokens a calibration sequence; data.seqlen by default")
    damping: float = Field(
        0.01, gt=0, description="SparseGPT: added to the diagonal of the inputs' second moment, as a share of its mean"
    )


class PriorSection(Section):
    method: Method = Field(
        "sparsegpt", description="One-shot method whose mask learning starts from (mask only, original weights)"
    )
    mask: str | None = Field(
        None,
        description="Start from a mask learned elsewhere instead: a mask file, a run directory, or a MaskLLM .npz; method is not used then",
    )
    strength: float = Field(
        3.0, ge=0, description="The paper's alpha: how strongly the start leans to the prior, in units of init_std"
    )
    init_std: float = Field(0.01, gt=0, description="Standard deviation of the paper's initial logits: the unit of strength")
    noise: bool = Field(
        False, description="Draw N(0, init_std) under the prior as the paper does; without, the start equals the prior exactly"
    )


class ScheduleSection(Section):
    start: float
    end: float
    curve: CurveName = Field("linear", description="linear is the paper's")


class BlockSection(Section):
    """Learning block by block; the keys of `learn` that are not here (noise, betas, precision, ...) count for it too."""

    steps: int = Field(48, gt=0, description="Optimizer steps a block")
    batch: int = Field(8, gt=0, description="Sequences a step, over all micro-batches")
    micro_batch: int = Field(4, gt=0, description="Sequences a forward pass")
    sequences: int = Field(64, gt=0, description="Sequences whose hidden states are kept, to learn from")
    held_out: int = Field(
        8, gt=0, description="Sequences beside them that decide whether a block's mask is better than its prior"
    )
    seqlen: int | None = Field(None, gt=1, description="Tokens a sequence; data.seqlen by default")
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate of the logits")
    temperature: ScheduleSection = Field(
        ScheduleSection(start=1.0, end=0.1, curve="exponential"), description="Softmax temperature tau"
    )
    scale: ScheduleSection = Field(ScheduleSection(start=100.0, end=100.0, curve="constant"), description="Logit scale kappa")
    objective: Literal["mse", "token-normalised", "channel-normalised"] = Field(
        "channel-normalised",
        description="Squared error of the block's outputs relative to all targets together (mse), for each token to its own target, or "
        "so with every channel divided by its spread",
    )
    prefix: Literal["dense", "pruned"] = Field(
        "pruned",
        description="What a block is learned on: inputs from the dense model, or from the already masked blocks before it; the targets "
        "are the dense model's either way",
    )
    cache: Literal["memory", "disk"] = Field(
        "memory", description="Where hidden states are kept between blocks; disk: in the run directory"
    )
    device: str | None = Field(
        None,
        description="Move one block at a time here to learn it (cuda, with model.device: cpu); null leaves it with the model",
    )
    min_tokens: int = Field(64, ge=0, description="An expert that fewer of the kept tokens reach keeps its prior")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> BlockSection:
        for name in ("batch", "sequences", "held_out"):
            if getattr(self, name) % self.micro_batch:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of micro_batch {self.micro_batch}")
        return self


class LearnSection(Section):
    scope: Literal["model", "block", "block-then-model"] = Field(
        "model",
        description="model: end to end (the paper's); block: one decoder block at a time, in the memory of one; block-then-model: end "
        "to end from the mask learned block by block",
    )
    block: BlockSection = BlockSection()
    steps: int = Field(2000, ge=0, description="Optimizer steps end to end; 0 keeps the mask that they start from")
    batch: int = Field(256, gt=0, description="Sequences a step, over all processes and micro-batches")
    micro_batch: int = Field(1, gt=0, description="Sequences a forward pass")
    parametrization: Literal["patterns", "scores"] = Field(
        "scores", description="patterns: a logit a candidate mask (the paper's); scores: a score a weight, a third less memory"
    )
    noise: bool = Field(False, description="Gumbel noise on the candidates, drawn anew every micro-batch (the paper's)")
    hard: bool = Field(False, description="Straight-through: hard masks forward, soft gradients backward")
    temperature: ScheduleSection = Field(
        ScheduleSection(start=1.0, end=0.1, curve="exponential"), description="Softmax temperature tau"
    )
    scale: ScheduleSection = Field(ScheduleSection(start=100.0, end=200.0), description="Logit scale kappa")
    learning_rate: float = Field(
        2e-4, gt=0, description="Peak learning rate of the logits; the more steps, the lower (docs/masks.md)"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps that ramps the learning rate up")
    final_rate: float = Field(0.1, ge=0, le=1, description="The cosine ends at this share of the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW")
    eps: float = Field(1e-8, gt=0, description="AdamW")
    weight_decay: float = Field(0.0, ge=0, description="AdamW, on the logits (the paper: 0.1)")
    clip: float = Field(1.0, ge=0, description="Clip the gradient to this norm; 0 does not clip")
    clip_by: Literal["network", "weight"] = Field(
        "network",
        description="The norm is that of the whole network's gradient, or each weight's own with its share of clip (see docs/memory.md)",
    )
    regulariser: float = Field(
        0.0,
        ge=0,
        description="The paper's lambda (1e-5): rewards masks that keep large weights; a sum over all weights, decays linearly to 0",
    )
    cross_entropy: float = Field(0.0, ge=0, description="Weight of the next-token loss (the paper: 1)")
    distillation: float = Field(1.0, ge=0, description="Weight of KL(dense model || masked model), at each token (the paper: 0)")
    precision: Precision = Field(
        "auto",
        description="Precision of the matrix products; logits and losses stay in fp32. auto is bf16 where the device has instructions for it, "
        "else fp32",
    )
    state: Literal["float32", "bfloat16", "8bit"] = Field(
        "float32",
        description="How logits and Adam's moments are kept: 12, 6 or 4 bytes a logit; the narrow ones are rounded stochastically",
    )
    step_in_backward: bool = Field(
        False,
        description="Move a weight's logits as soon as their gradient is there, so that no whole gradient exists (2 or 4 bytes a logit less)",
    )
    checkpoint_activations: bool = Field(
        False,
        description="Keep only what enters each block and compute the block again in the backward pass: a third more time, far less memory",
    )
    shard: Literal["none", "logits", "weights"] = Field(
        "none",
        description="What several processes share out, each keeping its own rows: logits, with gradients and optimizer state; or weights, "
        "which shares out the frozen weights under the masks too, and needs checkpoint_activations",
    )
    save_minutes: float = Field(10.0, gt=0, description="Write a checkpoint this often")

    @field_validator("shard", mode="before")
    @classmethod
    def _shard(cls, value: object) -> object:
        if isinstance(value, bool):
            now = "logits, or weights to share out the frozen weights too" if value else "none"
            raise ValueError(f"write {now}, in place of {str(value).lower()}")
        return value

    @model_validator(mode="after")
    def _shared_weights(self) -> LearnSection:
        if self.shard == "weights" and not self.checkpoint_activations:
            raise ValueError(
                "shard: weights needs checkpoint_activations: true; without it every process would keep all masked weights, whole, until the "
                "backward pass"
            )
        return self

    @model_validator(mode="after")
    def _some_loss(self) -> LearnSection:
        if self.cross_entropy == 0 and self.distillation == 0:
            raise ValueError("cross_entropy and distillation are both 0: there is nothing to learn from")
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        return self

    @model_validator(mode="after")
    def _step_in_backward(self) -> LearnSection:
        # Where something is shared out, a step's sequences are divided among processes first; the learner knows how many.
        end_to_end = self if self.scope != "block" and self.shard == "none" else None
        stages = {"": end_to_end, "block.": self.block if self.scope != "model" else None}
        for where, stage in stages.items():
            if self.step_in_backward and stage is not None and stage.batch != stage.micro_batch:
                raise ValueError(
                    f"step_in_backward cannot sum gradients over micro-batches; set {where}micro_batch to the batch, {stage.batch} (with "
                    "checkpoint_activations more sequences fit), or step_in_backward to false"
                )
        if self.step_in_backward and self.clip > 0 and self.clip_by == "network":
            raise ValueError(
                "step_in_backward never has the whole gradient to clip by its norm; set clip_by to weight, or clip to 0"
            )
        return self


class TextSection(Section):
    """A text to measure perplexity on."""

    source: SourceSection
    seqlen: int = Field(2048, gt=1, description="Tokens a window")
    limit: int | None = Field(None, gt=0, description="Measure the first windows only")
    bos: Literal["auto", "none", "every"] = Field(
        "auto", description="auto: what the tokenizer puts before the whole text; none; every: before every window"
    )


class EvaluateSection(Section):
    texts: dict[str, TextSection] = Field(
        {}, description="Measured at the end, by name; the first one is the summary's perplexity"
    )
    baselines: list[Baseline] = Field(["dense"], description="Methods measured beside the learned mask")
    every: int = Field(0, ge=0, description="Also measure the current hard mask every so many steps (0: only at the end)")
    every_limit: int | None = Field(None, gt=0, description="Windows of the first text to use for that")


class DomainSection(Section):
    """One domain: what its mask is learned from and how it is measured."""

    sources: list[SourceSection] = Field(min_length=1, description="Texts to learn from, in place of data.sources")
    text: TextSection = Field(description="Held-out text of the domain; every mask of the recipe is measured on it")


class LearnMaskRecipe(Section):
    """Learn an N:M mask on frozen weights (`compress learn-mask`)."""

    recipe: Literal["learn-mask"] = Field("learn-mask", description="What this recipe drives")
    description: str = Field("", description="One line for `compress recipes ls`")
    model: ModelSection
    pattern: str = Field("2:4", description="N:M: keep N of every M weights along the contracted dimension")
    weights: WeightsSection = WeightsSection()
    data: DataSection
    calibration: CalibrationSection = CalibrationSection()
    prior: PriorSection = PriorSection()
    learn: LearnSection = LearnSection()
    evaluate: EvaluateSection = EvaluateSection()
    domains: dict[str, DomainSection] = Field(
        {},
        description="Learn one mask for each of these domains instead of one for data.sources, each in its own folder of the run; a table "
        "shows every mask on every domain. With prior.mask they all start from one general mask",
    )
    seed: int = Field(0, ge=0, description="Of the order of the text, the initial noise and the Gumbel noise")

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> object:
        # YAML 1.1 reads an unquoted 2:4 as the sexagesimal number 124.
        if isinstance(value, int):
            raise ValueError(f"write the pattern in quotes, as in '2:4' (YAML read it as the number {value})")
        parts = str(value).split(":")
        if len(parts) != 2 or not all(p.strip().isdigit() for p in parts) or not 0 < int(parts[0]) < int(parts[1]):
            raise ValueError(f"{value!r} is not an N:M pattern with 0 < N < M; write it as in '2:4'")
        return value
