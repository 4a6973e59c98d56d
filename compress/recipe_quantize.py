"""What a recipe of `compress run` may say: profile the experts of a mixture-of-experts model, allocate bits to them, quantise, tune the
routers, export (`compress.recipe_file` reads it).

Imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from compress.recipe import DataSection, ModelSection, Section, TextSection

Grids = Literal["auto", "float", "asymmetric", "symmetric"]
QuantizerMethod = Literal["gptq", "rtn", "published"]


class CandidateSection(Section):
    """One way to store an expert or a projection of it."""

    bits: int = Field(ge=1, le=8, description="Width of a code")
    group_size: int | None = Field(None, gt=0, description="Weights that share a scale; quantizer.group_size by default")


class ImagesSection(Section):
    """Images with text, for calibration of a vision-language model."""

    path: str = Field(description="JSON Lines file, a record a sample")
    image_field: str = Field("image", description="Field with the path of the image file, relative to the JSON Lines file")
    prompt_field: str = Field("text", description="Field with the text that goes with the image")
    samples: int = Field(64, gt=0, description="Records to take, each a sequence of its own length, beside the samples of text")


class QuantizerSection(Section):
    method: QuantizerMethod = Field(
        "gptq",
        description="gptq: with compensation inside and between blocks, clip search and refinement; rtn: rounding to nearest, without the "
        "inputs; published: what the released code of Mixture Compressor does, for comparison",
    )
    group_size: int = Field(128, gt=0, description="Weights along the inputs that share a scale")
    grid: Grids = Field(
        "auto",
        description="auto: a free zero for packed-moe, symmetric for compressed-tensors, whose readers do best with it; symmetric "
        "and asymmetric have a level at zero. One "
        "bit is always sign and magnitude",
    )
    order: Literal["activation", "given"] = Field(
        "activation", description="Order in which GPTQ rounds columns; neither is stored"
    )
    rounds: int = Field(4, ge=0, description="Rounds of coordinate descent after GPTQ")
    token_weights: Literal["squared", "linear", "none"] = Field(
        "squared",
        description="How a token counts in an expert's Hessian: by the square of its routing weight (the error of the block's output), by "
        "the weight itself (MoEQuant), or all alike",
    )
    keep_zeros: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="Keep zero weights zero. auto: in matrices that are 2:4 sparse, so that prune-then-quantise keeps its pattern",
    )


class ProfileSection(Section):
    method: QuantizerMethod | None = Field(
        None, description="Quantiser that candidates are measured with; quantizer.method by default (MC probes with rtn)"
    )
    folder: str | None = Field(
        None,
        description="Where the profile is, or is to be kept, for several runs of one model, text, quantiser and set of candidates; profile/ "
        "of the run directory by default",
    )
    min_tokens: int = Field(32, ge=0, description="An expert that fewer calibration tokens reach is reported as starved")


class AllocateSection(Section):
    mode: Literal["error", "fisher", "pmq"] = Field(
        "error",
        description="What a candidate costs: its error at the block's output, that error times squared gradients of the loss, or MC's "
        "product of frequency, routing weight and error with a budget a layer",
    )
    granularity: Literal["expert", "projection", "gate-up", "layer"] = Field(
        "projection",
        description="What gets its own width: an expert, each of its matrices, its gate and up together and down, or all experts of a layer",
    )
    average_bits: float | None = Field(None, gt=0, description="Budget: average bits of the experts' codes, the papers' figure")
    max_bytes: int | None = Field(None, gt=0, description="Budget: bytes of all experts with scales and zeros")
    bits_per_weight: float | None = Field(None, gt=0, description="Budget: bits per weight of the whole model with everything")
    floor: dict[str, int] = Field({}, description="Glob -> least bits, on names like layers.0.experts.3.down_proj")
    ceiling: dict[str, int] = Field({}, description="Glob -> most bits")
    protect: list[str] = Field([], description="Globs of what gets its widest candidate")
    protect_super_experts: bool = Field(
        True, description="Give experts with massive outputs, without which models fall apart, their widest candidate"
    )
    exponents: tuple[float, float, float] = Field(
        (1.0, 1.5, 1.0), description="pmq: of frequency, routing weight and error; the paper states 1, 1, 2"
    )
    bits_file: str | None = Field(
        None, description="Take the widths from this file of `compress allocate-bits --out` instead of allocating; no budget then"
    )

    @model_validator(mode="after")
    def _budget(self) -> AllocateSection:
        budgets = [b for b in (self.average_bits, self.max_bytes, self.bits_per_weight, self.bits_file) if b is not None]
        if len(budgets) != 1:
            raise ValueError("give one of average_bits, max_bytes, bits_per_weight and bits_file")
        if self.mode == "pmq" and (self.granularity != "expert" or self.average_bits is None) and self.bits_file is None:
            raise ValueError("mode pmq shares out average_bits among experts: set granularity to expert and give average_bits")
        return self


class RestSection(Section):
    """Width of matrices that are no routed expert's: attention, shared experts, dense layers."""

    include: list[str] = Field(["*"], min_length=1, description="Globs over names of matrices; routers are left as they are")
    bits: int | None = Field(4, ge=1, le=8, description="null leaves them as they are")
    group_size: int | None = Field(None, gt=0, description="quantizer.group_size by default")


class TuneSection(Section):
    steps: int = Field(0, ge=0, description="Optimizer steps on the routers' weights alone, after quantising; 0 leaves them")
    batch: int = Field(8, gt=0, description="Sequences a step")
    learning_rate: float = Field(1e-4, gt=0, description="Peak, AdamW; cosine to a tenth")
    objective: Literal["kl", "cross-entropy"] = Field(
        "kl", description="Divergence from the original model, or the next-token loss"
    )


class QuantizeEvaluateSection(Section):
    texts: dict[str, TextSection] = Field(
        {}, description="Measured at the end, by name: perplexity, divergence from the original, tokens routed elsewhere"
    )


class ExportSection(Section):
    format: Literal["packed-moe", "compressed-tensors", "none"] = Field(
        "packed-moe", description="What `compress run` writes into the run directory as model/"
    )
    promote: bool = Field(
        False, description="compressed-tensors: store all experts of a layer at the width of its widest, values unchanged"
    )


class QuantizeRecipe(Section):
    """Quantise a mixture-of-experts model with mixed precision (`compress run`, `profile-experts`, `quantize`)."""

    recipe: Literal["quantize"] = Field(description="What this recipe drives")
    description: str = Field("", description="One line for `compress recipes ls`")
    model: ModelSection
    stream: bool | None = Field(
        None,
        description="Keep one decoder block in memory at a time, read from the files; null does so for models that take more than a quarter "
        "of the free memory",
    )
    cache: Literal["memory", "disk"] = Field("memory", description="Where the hidden states of the calibration text are kept")
    data: DataSection
    mask: str | None = Field(
        None,
        description="Mask file or run of learn-mask: prune the model by it first; what it prunes stays zero, so give two bits or more. All that "
        "it masks must be quantised",
    )
    samples: int = Field(128, gt=0, description="Calibration sequences of data.seqlen tokens")
    images: ImagesSection | None = Field(
        None, description="Calibrate on images with text, too, through the processor of a vision-language model"
    )
    candidates: list[int | CandidateSection] = Field(
        [1, 2, 3], min_length=1, description="Widths that an expert may get, or {bits, group_size}"
    )
    quantizer: QuantizerSection = QuantizerSection()
    profile: ProfileSection = ProfileSection()
    allocate: AllocateSection
    rest: list[RestSection] = Field(
        [RestSection()], description="Other matrices of the decoder blocks; the first rule that matches counts"
    )
    tune: TuneSection = TuneSection()
    evaluate: QuantizeEvaluateSection = QuantizeEvaluateSection()
    export: ExportSection = ExportSection()
    seed: int = Field(0, ge=0, description="Of the choice and order of the text")

    @field_validator("candidates")
    @classmethod
    def _widths(cls, value: list[int | CandidateSection]) -> list[int | CandidateSection]:
        if any(isinstance(c, int) and not 1 <= c <= 8 for c in value):
            raise ValueError("candidates are widths of 1 to 8 bits, or {bits, group_size}")
        pairs = [(c, None) if isinstance(c, int) else (c.bits, c.group_size) for c in value]
        if len(set(pairs)) < len(pairs):
            raise ValueError("the same candidate is there twice")
        return value

    @model_validator(mode="after")
    def _gradients(self) -> QuantizeRecipe:
        if self.images is not None and self.allocate.mode == "fisher":
            raise ValueError("gradients are taken on sequences of one length: allocate.mode fisher and images exclude each other")
        return self

    @model_validator(mode="after")
    def _servable(self) -> QuantizeRecipe:
        if self.export.format != "compressed-tensors":
            return self
        if self.quantizer.grid == "float":
            raise ValueError(
                "compressed-tensors has no grid with a free zero; set quantizer.grid to asymmetric, symmetric or auto"
            )
        if any((c if isinstance(c, int) else c.bits) < 2 for c in self.candidates):
            raise ValueError("compressed-tensors readers want 2 to 8 bits; take one-bit candidates out")
        if self.allocate.granularity != "layer" and not self.export.promote:
            raise ValueError(
                "compressed-tensors needs one width for all experts of a layer; set allocate.granularity to layer, or promote"
            )
        return self

    def pairs(self) -> list[tuple[int, int]]:
        """Candidates as (bits, group size), ascending."""
        found = [(c, None) if isinstance(c, int) else (c.bits, c.group_size) for c in self.candidates]
        return sorted((bits, group or self.quantizer.group_size) for bits, group in found)
