"""What memory each stage of `compress learn-mask` will take: the model's code run without data, and the arrays that stages keep.

On a CPU everything shares one memory. With a GPU the masks of prior and result stay in the host's, which is not planned here; the stages
tell what the GPU holds. Of several processes the plan is that of the first, whose share is the largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.device import dtype_on
from compress.errors import CompressError, UsageError
from compress.footprint import LiveBytes, empty_data, without_data
from compress.heap import resident
from compress.measure import WINDOW_TOKENS
from compress.models import load_tokenizer, resolve_source
from compress.recipe import LearnMaskRecipe
from compress.settings import block_settings, learn_settings
from compress.structure import decoder_blocks
from compress.text import find_text_files
from compress.weights import ParameterRef, WeightRef
from maskllm.gumbel import logit_width
from maskllm.learner import Learner
from maskllm.optim import logit_dtype
from maskllm.parametrization import MaskState, MaskTarget, attach, detach, own_parameter
from maskllm.patterns import Pattern
from maskllm.sharding import Sharding
from maskllm.update import LogitUpdates

CALIBRATION_BATCH = 8  # sequences, of `compress.session`
TEXT = 64 << 20  # bytes that tokenising leaves in the tokenizer's caches and the heap, measured; the ids come on top
TOKENISED = 60  # bytes a character of a text that an evaluation tokenises whole, measured
HEAP, HEAP_SHARE = 64 << 20, 0.05  # measured: what freed pieces between live ones take, of everything allocated below
MAPPED = 32 << 20  # bytes, from which on the C library (glibc) takes memory from the system and returns it, instead of its heap
SCORING = 1 << 24  # logits that an evaluation turns to float32 at once (`compress.evaluate`), beside their log-softmax

_IN_PIECES = ("activations", "activations and logits", "activations, or pruning of a matrix")


@dataclass(frozen=True)
class Stage:
    """The moment of a stage at which most is held: bytes by what holds them."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes at that moment."""
        return sum(self.parts.values())


@dataclass
class MemoryModel:
    """Stages of one recipe on one model. `model` is on the meta device and is given parameters without data.

    Raises CompressError for a model whose forward pass depends on the values of tensors, which a plan does not have.
    """

    recipe: LearnMaskRecipe
    model: Any
    refs: list[WeightRef]
    parameters: list[ParameterRef]
    device: torch.device
    processes: int = 1

    def __post_init__(self) -> None:
        self.dtype = dtype_on(self.device, self.recipe.model.dtype) or self.model.dtype
        self.pattern = Pattern.parse(self.recipe.pattern)
        self.pattern.candidates()  # cached here with its data
        itemsize = self.dtype.itemsize
        self.prunable = sum(p.refs[0].parameter.numel() for p in self.parameters)
        self.model_bytes = sum(p.numel() for p in self.model.parameters()) * itemsize
        self.weight_bytes = self.prunable * itemsize
        self.hosted = self.device.type == "cpu"
        self.shard: Sharding = self.recipe.learn.shard if self.processes > 1 else "none"
        # `compress.hosted`: until weights are shared out, the host keeps blocks and copies of weights, and a GPU the block that runs.
        self.visited = self.shard == "weights" and not self.hosted
        self.copy_bytes = 0 if self.visited else self.weight_bytes
        self.process = self._process() if self.hosted else 0
        sizes = [p.numel() * itemsize for p in self.model.parameters()]
        self.small = sum(size for size in sizes if size < MAPPED) / sum(sizes)

    def stages(self) -> list[Stage]:
        """Every stage that the recipe has, in order."""
        recipe = self.recipe
        live = LiveBytes()
        try:
            with without_data(live, self.device):
                empty_data(self.model, self.dtype, self.device)
                live.add([*self.model.parameters(), *self.model.buffers()], "model")
                found = [self._loading()]
                wanted = {"magnitude", "wanda", "ria", "sparsegpt"} & {
                    "" if recipe.prior.mask else recipe.prior.method,
                    *(b.removesuffix("-update") for b in recipe.evaluate.baselines),
                }
                found += [self._one_shot(method, live) for method in sorted(wanted)]
                if recipe.evaluate.texts:
                    found.append(self._evaluation(live))
                if recipe.learn.scope != "model":
                    found.append(self._learning_blocks(live))
                if recipe.learn.scope != "block":
                    found.append(self._learning(live))
        except RuntimeError as error:  # what torch raises, as this or its NotImplementedError, where a value is asked for
            raise CompressError(
                f"the memory of {type(self.model).__name__} cannot be planned: its forward pass needs data ({str(error).splitlines()[0]})"
            ) from error
        return found

    def _process(self) -> int:
        """What this process holds now, with the modules and the tokenizer of a run, and the text that a run reads."""
        recipe = self.recipe
        try:
            words = load_tokenizer(recipe.model.source, revision=recipe.model.revision)
        except UsageError:
            words = None  # a folder without a tokenizer can be planned, though not run
        calibration = recipe.calibration.samples * (recipe.calibration.seqlen or recipe.data.seqlen)
        tokens = max(recipe.learn.steps * recipe.learn.batch * recipe.data.seqlen, calibration)
        tokens = min(tokens, recipe.data.max_tokens or tokens)
        held = resident() + TEXT + 4 * tokens
        del words
        return held

    def _model(self) -> dict[str, int]:
        """The model before learning."""
        if not self.visited:
            return {"model": self.model_bytes}
        blocks = {id(block.module): block.module for block in decoder_blocks(self.model)}.values()
        sizes = [sum(p.numel() for p in block.parameters()) * self.dtype.itemsize for block in blocks]
        return {"model outside of its blocks": self.model_bytes - sum(sizes), "block that runs": max(sizes)}

    def _stage(self, name: str, parts: dict[str, int], model: dict[str, int] | None = None) -> Stage:
        """With what every stage holds."""
        whole = {"python, torch and text": self.process} | (model or self._model()) | parts
        if self.hosted:
            pieces = sum(size if holder in _IN_PIECES else size * self.small for holder, size in whole.items())
            whole["heap that the C library keeps"] = HEAP + int(HEAP_SHARE * (pieces - self.small * self.process))
        return Stage(name, {k: v for k, v in whole.items() if v})

    def _loading(self) -> Stage:
        """The file that is being read is mapped into memory, and one tensor of it is converted at a time."""
        place = resolve_source(self.recipe.model.source)
        files = [place.folder / place.gguf_file] if place.folder and place.gguf_file else []
        if place.folder and not files:
            files = list(place.folder.glob("*.safetensors"))
        parts = {"largest file": max((file.stat().st_size for file in files), default=0)}
        parts["largest tensor"] = max(p.numel() for p in self.model.parameters()) * self.dtype.itemsize
        return self._stage("loading", parts if self.hosted else {})

    def _masks(self, copies: int) -> dict[str, int]:
        return {"masks": copies * self.prunable if self.hosted else 0}

    def _one_shot(self, method: str, live: LiveBytes) -> Stage:
        recipe = self.recipe
        parts = {"original weights": self.copy_bytes, **self._masks(1)}
        if method == "magnitude":
            return self._stage(f"one-shot {method}", parts)
        seqlen = recipe.calibration.seqlen or recipe.data.seqlen
        batch = min(CALIBRATION_BATCH, recipe.calibration.samples)
        activations = self._forward(live, batch, seqlen, head=False)
        hidden = self.model.get_input_embeddings().weight.shape[1]
        by_block: dict[int, list[WeightRef]] = {}
        for ref in self.refs:
            by_block.setdefault(ref.layer or 0, []).append(ref)
        gram = 1 if method == "sparsegpt" else 0
        statistics = max(sum(4 * (gram * ref.shape[1] ** 2 + ref.shape[1]) for ref in block) for block in by_block.values())
        working = max(_working(*ref.shape, gram) for ref in self.refs)
        inside = {
            "hidden states": recipe.calibration.samples * seqlen * hidden * self.dtype.itemsize,
            "second moments of inputs": statistics,
            "activations, or pruning of a matrix": max(activations, working),
        }
        after = {"updated weights": self.copy_bytes if gram else 0}
        return self._stage(f"one-shot {method}", parts | max(inside, after, key=lambda p: sum(p.values())))

    def _evaluation(self, live: LiveBytes) -> Stage:
        texts = self.recipe.evaluate.texts.values()
        activations = max(
            self._forward(live, max(1, WINDOW_TOKENS // t.seqlen), t.seqlen, head=True) + self._scoring(t.seqlen) for t in texts
        )
        updated = self.copy_bytes if "sparsegpt-update" in self.recipe.evaluate.baselines else 0
        parts = {
            "original weights": self.copy_bytes,
            "updated weights": updated,
            "activations and logits": activations,
            "text as tokens": TOKENISED * max(_characters(t.source.path) for t in texts) if self.hosted else 0,
        }
        return self._stage("evaluation", parts | self._masks(2))

    def _scoring(self, seqlen: int) -> int:
        return 8 * min(SCORING, seqlen * self.model.get_input_embeddings().weight.shape[0])

    def _forward(self, live: LiveBytes, batch: int, length: int, head: bool) -> int:
        """Bytes that a forward pass adds, without gradients."""
        ids = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
        live.restart()
        before = live.peak
        with torch.no_grad():
            run = self.model if head else self.model.get_decoder()
            run(input_ids=ids, use_cache=False)
        return live.peak - before

    def _start(self, parameters: Sequence[ParameterRef], dtype: torch.dtype) -> tuple[list[MaskTarget], dict[str, Tensor]]:
        """Targets and logits of some parameters."""
        width = logit_width(self.pattern, self.recipe.learn.parametrization)
        targets = [MaskTarget(p.name, p.module, p.parameter_name, p.contracted_dim) for p in parameters]
        logits = {}
        for t in targets:
            shape = getattr(t.module, t.parameter_name).movedim(t.contracted_dim, -1).shape
            logits[t.name] = torch.empty(*shape[:-1], shape[-1] // self.pattern.m, width, dtype=dtype, device=self.device)
        return targets, logits

    def _learning_blocks(self, live: LiveBytes) -> Stage:
        """A micro-batch forward and backward through the block with the most weights to mask, and what is kept between blocks."""
        recipe, section = self.recipe, self.recipe.learn.block
        settings = block_settings(recipe.learn, recipe.seed)
        sizes: Counter[int] = Counter()
        for p in self.parameters:
            sizes[p.layer or 0] += p.refs[0].parameter.numel()
        layer, size = sizes.most_common(1)[0]
        block = decoder_blocks(self.model)[layer].module
        seqlen = section.seqlen or recipe.data.seqlen
        state, args, kwargs = self._entering(block, section.micro_batch, seqlen)
        targets, logits = self._start([p for p in self.parameters if p.layer == layer], logit_dtype(settings.state))
        self.model.requires_grad_(False)
        masks = MaskState(self.pattern, settings.parametrization)
        weights = attach(targets, masks, logits)
        del logits
        micro_batches = settings.batch // settings.micro_batch
        updates = LogitUpdates(weights, masks, settings, micro_batches)
        live.add([mask.logits for mask in weights.values()], "logits")
        for mask in weights.values():
            live.add(updates.optimizer.moments(mask.logits).values(), "moments")
        live.restart()
        for _ in range(min(2, micro_batches)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16), parametrize.cached():
                found = block(state.clone(), *args, **kwargs)
            found = found[0] if isinstance(found, (tuple, list)) else found
            loss = (found.float() - state.float()).square().sum(-1).mean()
            del found
            loss.backward()
            del loss
        updates.finish()
        updates.close()
        held = {k: v for k, v in live.at_peak.items() if k != "model"}
        detach(targets)
        sequences = section.sequences + section.held_out
        states = 2 * sequences * seqlen * state.shape[-1] * self.dtype.itemsize
        kept = {
            "hidden states": states if self.hosted and section.cache == "memory" else 0,
            "original weights of the block": size * self.dtype.itemsize,
        }
        return self._stage("learning block by block", held | kept | self._masks(1))

    def _entering(self, block: nn.Module, batch: int, length: int) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What the model calls a block with: hidden states, and the other arguments."""
        caught: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            caught.append((args[0], args[1:], rest) if args else (rest.pop("hidden_states"), (), rest))

        handle = block.register_forward_pre_hook(catch, with_kwargs=True)
        ids = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self.model.get_decoder()(input_ids=ids, use_cache=False)
        handle.remove()
        return caught[0]

    def _learning(self, live: LiveBytes) -> Stage:
        """A step as the learner takes it, with moments from earlier ones; or its end, when the masks are read off."""
        recipe = self.recipe
        settings = learn_settings(recipe.learn, recipe.seed)
        targets, logits = self._start(self.parameters, logit_dtype(settings.state))
        blocks: Sequence[nn.Module] = [block.module for block in decoder_blocks(self.model)]
        learner = Learner(
            self.model,
            targets,
            self.pattern,
            settings,
            logits,
            {},
            _FirstOf(self.processes, self.device),
            blocks=blocks,
            shard=self.shard,
        )
        if self.shard == "weights":
            live.add([own_parameter(target) for target in targets], "own rows of the frozen weights")
        live.add([mask.logits for mask in learner.weights.values()], "logits")
        for mask in learner.weights.values():
            live.add(learner.updates.optimizer.moments(mask.logits).values(), "moments")
        live.restart()
        ids = torch.zeros(settings.micro_batch, recipe.data.seqlen, dtype=torch.int64, device=self.device)
        for index in range(min(2, settings.batch // (settings.micro_batch * self.processes))):
            learner.state.micro_batch = index
            loss, parts = learner.losses(ids, settings.regulariser)
            learner.backward(loss)
            del loss, parts
        learner.updates.finish()
        texts = list(recipe.evaluate.texts.values())
        watched = texts[:1] if recipe.evaluate.every else []
        for text in texts if self.shard == "weights" else watched:  # shared out, the result is measured here as well
            windows = torch.zeros(max(1, WINDOW_TOKENS // text.seqlen), text.seqlen, dtype=torch.int64, device=self.device)
            with learner.final():
                out = self.model(input_ids=windows, use_cache=False).logits
                scoring = torch.empty(self._scoring(text.seqlen), dtype=torch.uint8, device=self.device)
                del out, scoring
        learner.close(gather=False)
        held = dict(live.at_peak)
        model = {"model": held.pop("model", 0)}  # what is left of it where weights are shared out, with its buffers
        masks = self._masks(2 if settings.state != "float32" else 1)
        return self._stage("learning", held | masks, model if self.shard == "weights" else None)


class _FirstOf(Accelerator):
    """The accelerator of the first of so many processes, none of which is there."""

    def __init__(self, processes: int, device: torch.device) -> None:
        self._processes, self._device = processes, device
        super().__init__(cpu=device.type == "cpu", device_placement=False)

    @property
    def num_processes(self) -> int:
        return self._processes

    @property
    def device(self) -> torch.device:
        return self._device


def _working(out: int, contracted: int, gram: int) -> int:
    """Bytes that `maskllm.priors` takes to prune one matrix: factors of the second moment, then weight and mask."""
    if not gram:
        return 12 * out * contracted
    return max(4 * out * contracted + 16 * contracted**2, 9 * out * contracted + 8 * contracted**2)


def _characters(path: str | None) -> int:
    """Of a text file; 0 for what is not one, as a hub data set, whose size a plan does not know."""
    if path is None:
        return 0
    try:
        return sum(file.stat().st_size for file in find_text_files(path))
    except UsageError:
        return 0
