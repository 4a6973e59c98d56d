"""What a recipe says of learning, as what `maskllm` takes."""

from __future__ import annotations

import dataclasses

from compress.recipe import LearnSection, ScheduleSection
from maskllm.gumbel import Schedule
from maskllm.settings import LearnSettings


def learn_settings(section: LearnSection, seed: int) -> LearnSettings:
    """End to end."""
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
