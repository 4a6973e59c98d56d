"""`import compress.hf` teaches transformers the packed formats.

After it `AutoModelForCausalLM.from_pretrained(folder)` (`AutoModelForImageTextToText` for a vision-language model), `generate` and
`save_pretrained` work on packed folders as on any other, and so does whatever loads its models through transformers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress import packed, packed_moe, runtime, runtime_lowbit, runtime_tables
from compress.checkpoint import TensorInfo, read_header
from compress.decode import fuse
from compress.routing.quantizer import RoutingConfig, RoutingQuantizer
from compress.routing.storage import attach_saved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Packed24Config",
    "Packed24Quantizer",
    "PackedMoeConfig",
    "PackedMoeQuantizer",
    "RoutingConfig",
    "RoutingQuantizer",
]


class _PackedQuantizer(HfQuantizer):
    """Puts packed modules into the empty model before transformers loads its tensors."""

    requires_calibration = True  # in transformers' words: it loads what was packed before, and packs nothing itself
    matrices: list[Any]  # packed parameters and tables: each has the `name` and `shape` of the dense one

    @abstractmethod
    def _install(self, model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> list[Any]:
        """Check `tensors` against the configuration, put the modules in, and return the packed parameters."""

    @abstractmethod
    def _check(self, model: PreTrainedModel) -> None:
        """Raise CompressError when the loaded tensors are damaged."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        files = [Path(file) for file in checkpoint_files or ()]
        self.where = str(files[0].parent) if files else "the checkpoint"
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors.update(read_header(file)[1])
        self.matrices = self._install(model, self.quantization_config.to_dict(), tensors)
        # While transformers loads, `_init_weights` of some models reaches for the dense weights; what bears this mark it leaves alone.
        for owner, name in self._owners(model):
            placeholder: Any = torch.empty(0)
            placeholder._is_hf_initialized = True
            setattr(owner, name, placeholder)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for owner, name in self._owners(model):
            delattr(owner, name)
        self._check(model)
        attach_saved(model, self.where)
        return model

    def _owners(self, model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
        """Every packed parameter as its module and its name there. (Tables have a weight, if an empty one.)"""
        for matrix in self.matrices:
            if isinstance(matrix, packed.Int8Table):
                continue
            module, _, parameter = matrix.name.rpartition(".")
            yield model.get_submodule(module), parameter

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """Packed linear layers are fixed operations; packed experts choose their tokens in Python."""
        return all(len(matrix.shape) == 2 for matrix in self.matrices)


@register_quantization_config(packed.QUANT_METHOD)
class Packed24Config(QuantizationConfigMixin):
    """The `quantization_config` of a packed-24 checkpoint, kept as config.json has it; `compress.packed` says what it means."""

    def __init__(self, **entries: Any) -> None:
        vars(self).update({**entries, "quant_method": packed.QUANT_METHOD})


@register_quantizer(packed.QUANT_METHOD)
class Packed24Quantizer(_PackedQuantizer):
    """Loads packed-24 checkpoints."""

    def _install(self, model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> list[Any]:
        matrices, tables = packed.from_config(config, self.where), packed.tables_from_config(config, self.where)
        packed.find_tensors([*matrices, *tables], tensors, lambda: model, self.where)
        runtime.install(model, matrices, config["activations"])
        runtime_tables.install_tables(model, tables, self.where)
        return [*matrices, *tables]

    def _check(self, model: PreTrainedModel) -> None:
        matrices = [matrix for matrix in self.matrices if isinstance(matrix, packed.PackedMatrix)]
        runtime.check_loaded(model, matrices, self.where)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        loaded = super()._process_model_after_weight_loading(model, **kwargs)
        fuse(loaded)
        return loaded


@register_quantization_config(packed_moe.QUANT_METHOD)
class PackedMoeConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed-moe checkpoint, kept as config.json has it; `compress.packed_moe` says what it means."""

    def __init__(self, **entries: Any) -> None:
        vars(self).update({**entries, "quant_method": packed_moe.QUANT_METHOD})


@register_quantizer(packed_moe.QUANT_METHOD)
class PackedMoeQuantizer(_PackedQuantizer):
    """Loads packed-moe checkpoints."""

    def _install(self, model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> list[Any]:
        parameters = packed_moe.from_config(config, self.where)
        packed_moe.find_tensors(parameters, tensors, lambda: model, self.where)
        runtime_lowbit.install(model, parameters)
        return parameters

    def _check(self, model: PreTrainedModel) -> None:
        runtime_lowbit.check_loaded(model, self.matrices, self.where)
