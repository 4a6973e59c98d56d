"""A model opened for a quantisation recipe, with its calibration text and the texts to measure on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import console
from compress.checkpoint import Checkpoint
from compress.data import TokenBlocks, tokenize
from compress.device import tell_slow
from compress.errors import UsageError
from compress.evaluate import EvalText, positions
from compress.masks import masks_of_model, open_mask
from compress.measure import eval_texts, measure_text, text_source
from compress.moe.mixture import Mixture, find_mixture
from compress.moe.rerouted import comparing
from compress.quantize.grid import Kind
from compress.quantize.images import image_batches
from compress.quantize.quantizer import Quantizer
from compress.quantize.store import QuantizedStore, put_into
from compress.recipe_quantize import QuantizeRecipe
from compress.stream import StreamedModel, open_streamed
from compress.structure import Block
from compress.walk import Batch
from compress.weights import WeightRef, by_parameter, find_weights
from maskllm.safefile import DTYPES
from maskllm.storage import mask_digest

_BATCH = 8  # calibration sequences a forward pass


@dataclass
class QuantizeSession:
    """What a run works on. batches: calibration token ids, int64 `[8, seqlen]`, then keyword arguments of the model, one for each sample
    with an image; blocks: all sequences of text, for tuning."""

    recipe: QuantizeRecipe
    streamed: StreamedModel
    refs: list[WeightRef]
    mixtures: dict[int, Mixture]
    blocks: TokenBlocks
    batches: list[Batch]
    texts: dict[str, EvalText]

    def quantizer(self, method: str | None = None) -> Quantizer:
        """The recipe's quantiser, or another method on its grids."""
        wanted = self.recipe.quantizer
        servable = self.recipe.export.format == "compressed-tensors"
        kind: Kind = ("symmetric" if servable else "float") if wanted.grid == "auto" else wanted.grid
        dtype = self.streamed.model.dtype
        scale = dtype if servable and dtype in (torch.float16, torch.bfloat16) else torch.float16
        return Quantizer(
            method or wanted.method,  # type: ignore[arg-type]
            kind,
            scale,
            wanted.order,
            wanted.rounds,
            wanted.token_weights,
            wanted.keep_zeros,
        )

    @functools.cached_property
    def stored_type(self) -> torch.dtype | None:
        """The one type that all of a local checkpoint is stored in, which exports keep whatever the model computes in; else None."""
        loaded = self.streamed.loaded
        if loaded.folder is None or loaded.gguf_file or not any(loaded.folder.glob("*.safetensors")):
            return None
        kinds = {info.dtype for info in Checkpoint(loaded.folder).tensors.values()}
        return DTYPES[kinds.pop()] if len(kinds) == 1 else None

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What a profile must share with the run that uses it."""
        tokens = hashlib.sha256(b"".join(_bytes_of(batch) for batch in self.batches)).hexdigest()
        method = self.recipe.profile.method or self.recipe.quantizer.method
        fisher = self.recipe.allocate.mode == "fisher"
        return {
            "model": self.streamed.fingerprint(),
            "calibration text": tokens,
            "quantiser": f"{self.quantizer(method)}",
            "candidates": str(self.recipe.pairs()),
            **({} if self.recipe.mask is None else {"mask": mask_digest(open_mask(Path(self.recipe.mask)).masks)}),
            **({"gradients": "measured"} if fisher else {}),
        }

    @functools.cached_property
    def original(self) -> StreamedModel:
        """The model without the recipe's mask: what results are compared with."""
        return self.streamed if self.recipe.mask is None else _open(self.recipe, masked=False)

    def close(self) -> None:
        """Take the hooks off the models."""
        self.streamed.close()
        if self.recipe.mask is not None and "original" in vars(self):
            self.original.close()

    @property
    def routers(self) -> list[str]:
        """Names of the plain router parameters."""
        return [m.router for m in self.mixtures.values() if m.router is not None]

    @contextmanager
    def quantized(self, store: QuantizedStore) -> Iterator[StreamedModel]:
        """The model with the values of a store; a second one beside the original."""
        other = _open(self.recipe)
        try:
            if other.streamed:
                refs = {ref.name: ref for ref in find_weights(other.model)}
                fixed = store.replaced()

                def change(block: Any) -> None:
                    for name, matrix in store.read_layer(block.index):
                        refs[name].view().copy_(matrix.dequantize(refs[name].parameter.dtype))
                    for name, value in fixed.items():
                        if name.startswith(block.name + "."):
                            other.model.get_parameter(name).copy_(value)

                other.change = torch.no_grad()(change)
            else:
                put_into(other.model, store)
            yield other
        finally:
            other.close()

    def measure(self, name: str, changed: StreamedModel | None) -> dict[str, Any]:
        """One line of the summary: perplexity on every text, and for a changed model its divergence from the original, the share of equal
        predictions, and the share of tokens' slots that go to other experts. `perplexity` is that on the first text."""
        row: dict[str, Any] = {
            "method": name,
            "perplexity": None,
            "perplexities": {},
            "kl": {},
            "top1_agreement": {},
            "rerouted": {},
        }
        original = self.original
        model = original if changed is None else changed
        fused = [m.name for m in self.mixtures.values() if m.fused]
        for label, text in self.texts.items():
            wanted = self.recipe.evaluate.texts[label]
            if changed is None:
                found = measure_text(name, label, model.model, original.loaded, text, wanted)
            else:
                with comparing(model.model, original.model, fused) as rerouted:
                    found = measure_text(name, label, model.model, original.loaded, text, wanted, original.model)
                row["kl"][label], row["top1_agreement"][label] = found.kl, found.top1_agreement
                row["rerouted"][label] = rerouted.share
            row["perplexities"][label] = found.perplexity
        row["perplexity"] = next(iter(row["perplexities"].values()), None)
        return row


def _bytes_of(batch: Batch) -> bytes:
    """What tells a batch from others: its token ids, or names, shapes and bytes of its tensors."""
    if isinstance(batch, Tensor):
        return batch.numpy().tobytes()
    parts = []
    for name, value in sorted(batch.items()):
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts.append(f"{name} {tuple(value.shape)} {value.dtype}\n".encode() + raw)
    return b"".join(parts)


def _open(recipe: QuantizeRecipe, *, masked: bool = True) -> StreamedModel:
    wanted = recipe.model
    opened = open_streamed(
        wanted.source,
        stream=recipe.stream,
        dtype=wanted.dtype,
        device=wanted.device,
        revision=wanted.revision,
        trust_remote_code=wanted.trust_remote_code,
    )
    if masked and recipe.mask is not None:
        _put_mask(opened, Path(recipe.mask))
    return opened


def _put_mask(opened: StreamedModel, path: Path) -> None:
    """Make the weights that a mask prunes zero: now, or with every block that is loaded. Raises UsageError for another model's mask."""
    file = open_mask(path)
    named = {p.name: p for p in by_parameter(find_weights(opened.model))}
    unknown = sorted(set(file.masks) - set(named))
    if unknown:
        raise UsageError(f"{path} masks {unknown[0]}, which is no matrix in the decoder blocks of {opened.loaded.source}")
    masks = masks_of_model(path, [named[name] for name in file.masks], file.pattern)

    @torch.no_grad()
    def change(block: Block | None) -> None:
        for name, mask in masks.items():
            if block is None or named[name].layer == block.index:
                parameter = opened.model.get_parameter(name)
                parameter.mul_(mask.to(parameter.device))

    if opened.streamed:
        opened.change = change
    else:
        change(None)


def prepare(recipe: QuantizeRecipe) -> QuantizeSession:
    """Open model and texts and check that they fit the recipe. Writes nothing. Raises UsageError for a dense model and too little text."""
    texts = eval_texts(recipe.evaluate.texts)
    with console.log.status(f"opening {recipe.model.source}"):
        streamed = _open(recipe)
    tell_slow(streamed.model)
    refs = find_weights(streamed.model)
    mixtures = {b.index: m for b in streamed.blocks if (m := find_mixture(streamed.model, b, refs)) is not None}
    if not mixtures:
        raise UsageError(
            f"{recipe.model.source} has no mixture of experts; it is a dense model. Prune it with `compress learn-mask`, or quantise it "
            "with another tool: allocation among experts is what this command is for"
        )
    limit = positions(streamed.model)
    if limit and recipe.data.seqlen > limit:
        raise UsageError(f"data.seqlen is {recipe.data.seqlen}, but {recipe.model.source} has {limit} positions")
    with console.log.status("reading the text"):
        sources = [text_source(s) for s in recipe.data.sources]
        needed = max(recipe.samples, recipe.tune.steps * recipe.tune.batch) * recipe.data.seqlen
        most = recipe.data.max_tokens or (needed if any(s.endless for s in sources) else None)
        blocks = TokenBlocks(tokenize(sources, streamed.loaded.tokenizer, most), recipe.data.seqlen, recipe.seed)
    if recipe.samples > len(blocks):
        raise UsageError(
            f"samples is {recipe.samples}, but the text holds only {len(blocks)} sequences of {recipe.data.seqlen} tokens"
        )
    batches: list[Batch] = list(blocks.batch(0, recipe.samples).split(_BATCH))
    with_images = _images(recipe, streamed)
    batches += with_images
    experts = sum(len(m.experts) for m in mixtures.values())
    weights = sum(expert.weights for m in mixtures.values() for expert in m.experts)
    how = "one block in memory at a time" if streamed.streamed else "in memory"
    console.log.print(
        f"{recipe.model.source}, {how}: {experts} experts in {len(mixtures)} layers, {weights:,} weights; {recipe.samples} x "
        f"{recipe.data.seqlen} calibration tokens" + (f", and {len(with_images)} images with text" if with_images else "")
    )
    return QuantizeSession(recipe, streamed, refs, mixtures, blocks, batches, texts)


def _images(recipe: QuantizeRecipe, streamed: StreamedModel) -> list[dict[str, Tensor]]:
    """The samples with images. Raises UsageError for those longer than the model's positions, and what `image_batches` raises."""
    if recipe.images is None:
        return []
    with console.log.status("reading the images"):
        found = image_batches(
            recipe.images,
            streamed.loaded,
            seed=recipe.seed,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    limit, longest = positions(streamed.model), max(inputs["input_ids"].shape[1] for inputs in found)
    if limit and longest > limit:
        raise UsageError(f"an image with its text takes {longest} tokens, but {recipe.model.source} has {limit} positions")
    return found


def other_size(session: QuantizeSession, rest: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Weights and bytes of everything that is no routed expert: quantised matrices with scales, all else in the type it is stored in."""
    from compress.moe.assign import matrix_bytes

    quantizer = session.quantizer()
    inside = {id(ref.parameter): 0 for ref in session.refs if ref.expert is not None}
    by_parameter = {ref.full_name: ref for ref in session.refs if ref.name in rest}
    weights = nbytes = 0
    for name, parameter in session.streamed.model.named_parameters():
        if id(parameter) in inside:
            continue
        weights += parameter.numel()
        ref = by_parameter.get(name)
        if ref is None:
            nbytes += parameter.numel() * (session.stored_type or parameter.dtype).itemsize
        else:
            bits, group = rest[ref.name]
            nbytes += matrix_bytes(quantizer.grid(bits, group), *ref.shape)
    return weights, nbytes
