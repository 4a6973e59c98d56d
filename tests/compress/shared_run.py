"""One process of several that run a recipe with shared weights: run by test_processes.py through torchrun.

    torchrun ... shared_run.py RECIPE.json FOLDER

Runs the recipe in FOLDER/run. Each process writes to FOLDER/RANK.json what it holds of the model once it has learned: bytes of the storages of masked
weights and of all other parameters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import compress.learn
from compress.recipe_file import check_recipe
from maskllm.parametrization import own_parameter


def storages(tensors: Any) -> int:
    """Bytes of the distinct storages under these tensors."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def main() -> None:
    """See above."""
    recipe, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    measure = compress.learn._measured_together

    def recording(session: Any, learner: Any, processes: Any) -> Any:
        masked = [own_parameter(target) for target in learner.targets]
        logits = {id(mask.logits) for mask in learner.weights.values()}
        others = [p for p in session.loaded.model.parameters() if id(p) not in logits | {id(m) for m in masked}]
        found = {"masked": storages(masked), "others": storages(others)}
        (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
        return measure(session, learner, processes)

    compress.learn._measured_together = recording
    compress.learn.learn_mask(check_recipe(recipe, "test"), folder / "run", resume=False, resume_command="")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
