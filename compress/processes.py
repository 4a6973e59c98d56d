"""Several processes on one run, started by `accelerate launch -m compress ...` or `torchrun -m compress ...`.

The first process does everything that one process does: it finds the prior, measures, writes the run directory. The others load the
model, take the prior from the run directory (which all must see, on several nodes too) and learn along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from compress import console
from compress.errors import UsageError
from compress.models import pick_device
from compress.recipe import LearnMaskRecipe
from compress.weights import WeightRef

_PATIENCE = timedelta(hours=12)  # the others wait while the first prunes and measures


@dataclass(frozen=True)
class Processes:
    """The processes of this run, seen from this one."""

    accelerator: Accelerator

    @classmethod
    def join(cls, recipe: LearnMaskRecipe) -> Processes:
        """Meet the others, if there are any. Raises UsageError for what several processes cannot do."""
        handlers = [
            InitProcessGroupKwargs(timeout=_PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        accelerator = Accelerator(cpu=pick_device(recipe.model.device).type == "cpu", kwargs_handlers=handlers)
        if accelerator.num_processes > 1:
            if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
                raise UsageError(
                    f"{accelerator.distributed_type.value} is not supported: every process holds the whole model and its logits; launch "
                    "with --multi_gpu, and where that does not fit set learn.checkpoint_activations and learn.state: 8bit"
                )
            if recipe.learn.scope != "model":
                raise UsageError(
                    f"learn.scope: {recipe.learn.scope} runs in one process; launch it without accelerate or torchrun"
                )
            if not accelerator.is_main_process:
                console.log.quiet = True
        return cls(accelerator)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and measures."""
        return self.accelerator.is_main_process

    def expect_idle(self, refs: Sequence[WeightRef]) -> None:
        """Experts in a list may get no token in a micro-batch, and their logits no gradient; averaging must not wait for it then."""
        idle = any(ref.expert is not None and ref.parameter.dim() == 2 for ref in refs)
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
