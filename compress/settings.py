"""What a recipe says of learning, as what `maskllm` takes, and what it leaves to the machine, settled."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch

from compress.device import fastest_dtype, multiplies, pick_device
from compress.recipe import LearnMaskRecipe, LearnSection, ScheduleSection, Section
from compress.recipe_quantize import QuantizeRecipe
from compress.recipe_routing import LearnRoutingRecipe
from maskllm.gumbel import Schedule
from maskllm.settings import LearnSettings

R = TypeVar("R", LearnMaskRecipe, LearnRoutingRecipe, QuantizeRecipe)


def settled(recipe: R) -> R:
    """The recipe with `model.dtype: fastest` and `learn.precision: auto` replaced by what they mean on its device.

    A run records, continues and compares the settled recipe, so that it does not go on in another precision unnoticed on a machine of
    another kind. Raises UsageError for a device that is not there.
    """
    device = pick_device(recipe.model.device)
    changes: dict[str, Section] = {}
    if recipe.model.dtype == "fastest":
        changes["model"] = recipe.model.model_copy(update={"dtype": fastest_dtype(device)})
    if not isinstance(recipe, QuantizeRecipe) and recipe.learn.precision == "auto":
        if isinstance(recipe, LearnMaskRecipe) and recipe.learn.scope == "block" and recipe.learn.block.device:
            device = pick_device(recipe.learn.block.device)
        precision = "bf16" if multiplies(torch.bfloat16, device) else "fp32"
        changes["learn"] = recipe.learn.model_copy(update={"precision": precision})
    return recipe.model_copy(update=changes)


def learn_settings(section: LearnSection, seed: int) -> LearnSettings:
    """End to end, of a settled recipe."""
    if section.precision == "auto":
        raise ValueError("learn.precision is auto, which depends on the device: take the section of a settled recipe")
    return LearnSettings(
        steps=section.steps,
        batch=section.batch,
        micro_batch=section.micro_batch,
        parametrization=section.parametrization,
        noise=section.noise,
        hard=section.hard,
        temperature=_schedule(section.temperature),
        scale=_schedule(section.scale),
        learning_rate=section.learning_rate,
        warmup=section.warmup,
        final_rate=section.final_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        clip=section.clip,
        clip_by=section.clip_by,
        regulariser=section.regulariser,
        ce_weight=section.cross_entropy,
        kl_weight=section.distillation,
        bf16=section.precision == "bf16",
        state=section.state,
        step_in_backward=section.step_in_backward,
        checkpoint_activations=section.checkpoint_activations,
        seed=seed,
    )


def block_settings(section: LearnSection, seed: int) -> LearnSettings:
    """One block: as end to end, but for what `learn.block` says itself."""
    block = section.block
    return dataclasses.replace(
        learn_settings(section, seed),
        steps=block.steps,
        batch=block.batch,
        micro_batch=block.micro_batch,
        temperature=_schedule(block.temperature),
        scale=_schedule(block.scale),
        learning_rate=block.learning_rate,
    )


def _schedule(section: ScheduleSection) -> Schedule:
    return Schedule(section.start, section.end, section.curve)
