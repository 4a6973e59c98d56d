"""`--format torchao-fp8-24`: a dense checkpoint with what vLLM needs to run it on the sparse tensor cores of a Hopper GPU.

vLLM hands every linear layer to torchao, which rounds it to FP8 (e4m3, one scale a row) and packs its zeros away when the model is
loaded; the checkpoint stays bfloat16. The configuration is torchao's own serialised form (`torchao.core.config.config_to_dict`), the
way to pass it is that of vLLM 0.33 (`hf_overrides["quantization_config_file"]`). Both were read in the released code of vLLM 0.33.0 and
torchao 0.18.0, and the file was loaded by torchao 0.18.0; no GPU has run it yet, and the card says so.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.structure import is_conv1d, is_linear, join
from compress.weights import find_weights
from maskllm.patterns import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_NAME = "torchao_config.json"
_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
# Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), packing_format=Float8PackingFormat.SPARSE_CUTLASS); whatever is
# not named has its default, which keeps the file readable for torchao versions with other fields.
CONFIG: dict[str, Any] = {
    "_type": "Float8DynamicActivationFloat8WeightConfig",
    "_version": 2,
    "_data": {
        "granularity": [_PER_ROW, _PER_ROW],
        "packing_format": {"_type": "Float8PackingFormat", "_data": "SPARSE_2D_DATA_2D_METADATA"},
    },
}


def check_servable(model: PreTrainedModel, masked: Iterable[str], pattern: Pattern) -> None:
    """Raise UsageError where vLLM with torchao would not compute what the checkpoint says.

    torchao packs every linear layer that vLLM gives it, keeping two weights of four even of one that is not sparse, so all of them have to
    be masked 2:4. Experts are no linear layers there and would stay dense.
    """
    if pattern != Pattern(2, 4):
        raise UsageError(f"torchao packs 2:4, and this mask is {pattern}; use --format dense")
    if any(ref.expert is not None for ref in find_weights(model)):
        raise UsageError("vLLM gives torchao no experts, so those of this model would stay dense; use --format dense")
    masked, head = set(masked), model.get_output_embeddings()
    for name, module in model.named_modules():
        weight = join(name, "weight")
        if (is_linear(module) or is_conv1d(module)) and module is not head and weight not in masked:
            raise UsageError(
                f"{weight} is not masked, and torchao would drop two of every four of its weights; mask all linear layers, "
                "or use --format dense"
            )


def config_file() -> str:
    """The text of `torchao_config.json`."""
    return json.dumps(CONFIG, indent=2) + "\n"


def serve_line(folder: str) -> str:
    """The command that serves the checkpoint in `folder` with vLLM."""
    overrides = json.dumps({"quantization_config_file": f"{folder}/{CONFIG_NAME}"})
    command = ["vllm", "serve", folder, "--dtype", "bfloat16", "--quantization", "torchao", "--hf-overrides", overrides]
    return shlex.join(command)


def notes() -> str:
    """The section of the model card."""
    return (
        "## Serve on sparse tensor cores\n\n"
        f"```sh\n{serve_line('FOLDER')}\n```\n\n"
        "Not verified: written from the code of vLLM 0.33.0 and torchao 0.18.0, and no GPU has run it yet. It needs a GPU of compute "
        "capability 9.0 (H100, H200) and a torchao whose CUDA extension fits the torch of vLLM. Weights and activations are rounded to "
        "FP8, so measure the quality of what is served. Layers with a size that 16 does not divide stay bfloat16.\n"
    )
