"""Several processes on one run, started by `accelerate launch -m compress ...` or `torchrun -m compress ...`.

The first process does everything that one process does: it finds the prior, measures, writes the run directory. The others load the
model, take the prior from the run directory (which all must see, on several nodes too) and learn along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, parse_flag_from_env

from compress import console
from compress.device import pick_device
from compress.errors import UsageError
from compress.recipe import LearnMaskRecipe
from compress.recipe_routing import LearnRoutingRecipe
from compress.weights import WeightRef
from maskllm.sharding import Sharding

_PATIENCE = timedelta(hours=12)  # the others wait while the first prunes and measures


@dataclass(frozen=True)
class Processes:
    """The processes of this run, seen from this one."""

    accelerator: Accelerator
    shard: Sharding = "none"  # what each keeps only its own share of; all of them take part in whatever reads a mask

    @classmethod
    def join(cls, recipe: LearnMaskRecipe | LearnRoutingRecipe) -> Processes:
        """Meet the others, if there are any. Raises UsageError for what several processes cannot do."""
        # Refused rather than taken for learn.shard: weights. What an FSDP launch says of wrapping, offload and state dicts would not be done,
        # and transformers goes by its variables too when it loads a model: what it expects FSDP to send stays unset in all processes but the
        # first. Asked before accelerate reads the variables, at which it fails where there is no GPU.
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            _refuse_wrapping(DistributedType.FSDP.value)
        handlers = [
            InitProcessGroupKwargs(timeout=_PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        accelerator = Accelerator(cpu=pick_device(recipe.model.device).type == "cpu", kwargs_handlers=handlers)
        if accelerator.num_processes > 1:
            if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
                _refuse_wrapping(accelerator.distributed_type.value)
            if isinstance(recipe, LearnMaskRecipe) and recipe.learn.scope != "model":
                raise UsageError(
                    f"learn.scope: {recipe.learn.scope} runs in one process; launch it without accelerate or torchrun"
                )
            if not accelerator.is_main_process:
                console.log.quiet = True
        shard = recipe.learn.shard if isinstance(recipe, LearnMaskRecipe) else "none"
        return cls(accelerator, shard if accelerator.num_processes > 1 else "none")

    @property
    def sharded(self) -> bool:
        """Whether each process keeps only its share of something."""
        return self.shard != "none"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and measures."""
        return self.accelerator.is_main_process

    def expect_idle(self, refs: Sequence[WeightRef]) -> None:
        """Experts in a list may get no token in a micro-batch, and their logits no gradient; averaging must not wait for it then.

        Raises UsageError where the logits are shared out, which cannot do without them.
        """
        idle = any(ref.expert is not None and ref.parameter.dim() == 2 for ref in refs)
        if idle and self.sharded:
            raise UsageError(
                "learn.shard needs every process to read the same weights, but these experts are modules that only run where a token reaches "
                "them; set learn.shard to none"
            )
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = idle

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them must ask."""
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device))
        return bool(total.item() > 0)


def _refuse_wrapping(kind: str) -> NoReturn:
    raise UsageError(
        f"{kind} would wrap the model in a way of its own, which is not used here; launch with --multi_gpu (or torchrun), and to learn masks of "
        "a model that does not fit into each GPU set learn.shard: weights (logits where only logits and optimizer state do not fit)"
    )
