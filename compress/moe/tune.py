"""Tune the routers of a quantised model, and nothing else of it.

Quantised experts give other outputs, so later routers see other hidden states and send tokens elsewhere (more than 40 % of them at 1.5 bits:
GEMQ, arXiv 2605.23078). Their weights are less than 0.04 % of a model, so a minute of training is enough to set them right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.recipe_quantize import TuneSection
from maskllm.objective import token_loss

Progress = Callable[[int, int, str], None]


def tune_routers(
    model: nn.Module,
    original: nn.Module,
    routers: Sequence[str],
    batches: Callable[[int, int], Tensor],
    settings: TuneSection,
    *,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Tensor] | None:
    """Train the parameters `routers` of `model` (by name) and return their new values in the model's type; the model keeps them.

    original: the unquantised model, for the divergence. batches(step, size): token ids, int64 `[size, length]`. They are trained in float32.
    Returns None when it was asked to stop, with the routers as they were. Raises UsageError when there is no router to train, CompressError
    when the loss is not finite.
    """
    if not routers:
        raise UsageError(
            "no mixture of this model has a plain router [experts, hidden], so there is nothing to tune; set tune.steps to 0"
        )
    device = next(model.parameters()).device
    before = {name: model.get_parameter(name).detach().clone() for name in routers}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = [model.get_parameter(name) for name in routers]
    kinds = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    stopped = False
    try:
        for step in range(settings.steps):
            if asked_to_stop():
                stopped = True
                break
            share = step / settings.steps
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))
            ids = batches(step, settings.batch).to(device)
            with torch.no_grad():
                teacher = original(input_ids=ids, use_cache=False).logits if settings.objective == "kl" else None
            with torch.autocast(device.type, torch.bfloat16, enabled=kinds[0] == torch.bfloat16):
                student = model(input_ids=ids, use_cache=False).logits
            by_kl = settings.objective == "kl"
            loss, _, _ = token_loss(student, teacher, ids, ce_weight=float(not by_kl), kl_weight=float(by_kl))
            if not bool(loss.isfinite()):
                raise CompressError(
                    f"the loss is {float(loss.detach())} at step {step} of tuning the routers: lower tune.learning_rate"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if progress:
                progress(step + 1, settings.steps, f"loss {float(loss.detach()):.4f}")
    finally:
        for parameter, kind in zip(parameters, kinds, strict=True):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(kind)
    if stopped:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
        return None
    return {name: model.get_parameter(name).detach().clone() for name in routers}
