"""How transformers' `from_pretrained` comes to attach a routing: to it, a checkpoint with a routing is one quantised by "compress-routing".

The weights of such a folder are dense and loaded as ever; nothing is quantised. Folders whose quantization_config is another of ours
call `compress.routing.storage.attach_saved` from their own quantizer instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.errors import UsageError
from compress.routing.storage import JSON_NAME, TENSORS_NAME, attach_saved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "compress-routing"


@register_quantization_config(QUANT_METHOD)
class RoutingConfig(QuantizationConfigMixin):
    """The `quantization_config` of a dense checkpoint with a routing beside it."""

    def __init__(self, **entries: Any) -> None:
        vars(self).update({**entries, "quant_method": QUANT_METHOD})


@register_quantizer(QUANT_METHOD)
class RoutingQuantizer(HfQuantizer):
    """Attaches the routing once transformers has loaded the weights."""

    requires_calibration = True  # in transformers' words: it loads what was made before, and makes nothing itself

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config: Any = model.config
        self.folder = find_routing(checkpoint_files or [], str(config.name_or_path), getattr(config, "_commit_hash", None))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if attach_saved(model, self.folder) is None:
            raise UsageError(
                f"{self.folder} says that it has a routing, but there is no {JSON_NAME} in it; copy {JSON_NAME} and {TENSORS_NAME} there, or "
                "take quantization_config out of its config.json to run it unpruned"
            )
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` would leave the routing behind, so it refuses."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False


def find_routing(checkpoint_files: list[str], name: str, revision: str | None) -> Path:
    """The folder with the routing of a checkpoint that is being loaded; on the hub both files are fetched into its snapshot."""
    folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(name)
    if not (folder / JSON_NAME).is_file() and not Path(name).exists():
        from transformers.utils.hub import cached_file

        for file in (JSON_NAME, TENSORS_NAME):
            fetched = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            folder = Path(fetched).parent if fetched else folder
    return folder
