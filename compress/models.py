"""Load a model with its tokenizer: from the hub, a folder, a GGUF file or the embedded assets."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.assets import asset_path, is_asset
from compress.checkpoint import Checkpoint
from compress.device import dtype_on, pick_device
from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


@dataclass
class LoadedModel:
    """A causal language model in evaluation mode. `folder` is its local folder when it has one, `gguf_file` the file in it.

    `tokenizer` is None only after `load_model(..., tokenizer=False)`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    folder: Path | None = None
    gguf_file: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a model is: `location` is what transformers' `from_pretrained` takes (a folder or a hub name)."""

    location: str
    folder: Path | None
    gguf_file: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` needs besides the location."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def resolve_source(source: str) -> Source:
    """Find `asset:NAME`, a .gguf file, a folder (with config.json, or with one .gguf file) or else a hub name.

    Raises UsageError for a path that is not there and for a folder that holds no model.
    """
    if is_asset(source):
        path = asset_path(source)
        if not path.is_dir():
            raise UsageError(f"{source} is a text, not a model")
        return Source(str(path), path, None)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{source} is a file, but no .gguf; give the folder of the model")
        return _gguf(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path), path, None)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(files[0])
        if files:
            raise UsageError(f"{source} holds several .gguf files; name one: {', '.join(f.name for f in files)}")
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise UsageError(f"{source} is not the folder of a model: it has no config.json and no .gguf file (it holds: {found})")
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or source.endswith(".gguf"):
        raise UsageError(f"there is no model at {source} (looked in {Path.cwd()})")
    return Source(source, None, None)


def _gguf(file: Path) -> Source:
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"reading {file.name} needs the package gguf: pip install 'maskllm-compress[gguf]'")
    return Source(str(file.parent), file.parent, file.name)


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: bool = True,
) -> LoadedModel:
    """Load model and tokenizer (the model alone with `tokenizer=False`, for work that reads no text).

    source: see `resolve_source`. dtype: see `compress.device.dtype_on`; a GGUF file is dequantised, to float32 with "auto". device: "auto" is cuda
    where there is one, else cpu. Raises UsageError for whatever is wrong with the source.
    """
    from transformers import AutoConfig

    import compress.hf  # noqa: F401  so that transformers knows the packed formats, from the hub too
    from compress.packed import is_packed
    from compress.packed_moe import is_packed_moe

    place = pick_device(device)
    kind = dtype_on(place, dtype)
    found = resolve_source(source)
    if found.folder is not None and found.gguf_file is None and (is_packed(found.folder) or is_packed_moe(found.folder)):
        Checkpoint(found.folder)  # says what is missing or cut short before anything is loaded
    options: dict[str, Any] = {"dtype": kind or "auto", "revision": revision, "trust_remote_code": trust_remote_code}
    if found.gguf_file:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
        options["dtype"] = kind or torch.float32
    # Weights of the wrong shape are let through here because `_check_complete` can name them and transformers only logs them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _explained(source), _quiet():
        config = AutoConfig.from_pretrained(
            found.location, **found.arguments, revision=revision, trust_remote_code=trust_remote_code
        )
        found_model: Any = model_class(config).from_pretrained(found.location, config=config, **found.arguments, **options)
        model, report = found_model
        _check_complete(source, report)
        words: Any = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code) if tokenizer else None
        if found.gguf_file:
            _forget_quantization(model)
        model.to(place).eval()
    return LoadedModel(model, words, source, found.folder, found.gguf_file)


def model_class(config: PreTrainedConfig) -> Any:
    """The auto class that makes a language model of a configuration: AutoModelForCausalLM, or where transformers knows the
    configuration only with images and text, AutoModelForImageTextToText."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if custom or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    with_images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM  # whose error names what it knows


def _check_complete(source: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights of its model: transformers would fill them with random numbers and go on."""
    missing = sorted(report.get("missing_keys") or ())
    mismatched = sorted(
        str(key[0]) if isinstance(key, (tuple, list)) else str(key) for key in report.get("mismatched_keys") or ()
    )
    for names, fault in ((missing, "are missing"), (mismatched, "have another shape than config.json says")):
        if names:
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise UsageError(f"{source} is not a whole checkpoint: {len(names)} of its model's weights {fault} ({shown})")


def _forget_quantization(model: PreTrainedModel) -> None:
    """A dequantised GGUF model is an ordinary one; what transformers remembers of the file would keep it from being saved as such."""
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


def load_tokenizer(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a source. Raises UsageError when it has none."""
    from transformers import AutoTokenizer

    found = resolve_source(source)
    if found.folder is not None and not found.gguf_file and not any((found.folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(
            f"{source} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}; copy those of the original model there"
        )
    with _explained(source), _quiet():
        return AutoTokenizer.from_pretrained(
            found.location, **found.arguments, revision=revision, trust_remote_code=trust_remote_code
        )


def meta_model(source: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights (on the meta device), from its configuration alone: names, shapes and types for a plan."""
    from transformers import AutoConfig

    found = resolve_source(source)
    with _explained(source), _quiet():
        config = AutoConfig.from_pretrained(
            found.location, **found.arguments, revision=revision, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
        return model.eval()


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all parameters, whatever masks hang over them."""
    total = hashlib.sha256()
    parameters = {
        name.replace("parametrizations.", "").removesuffix(".original"): parameter
        for name, parameter in model.named_parameters()
        if not name.endswith(".logits")
    }
    for plain, parameter in sorted(parameters.items()):  # sorted: a parametrization moves its weight behind the others
        total.update(f"{plain} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        total.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for a bad source into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise CompressError(f"{source} cannot be loaded: a safetensors file in it is damaged or cut short ({error})") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        place = resolve_source(source)
        if place.folder is not None:
            raise UsageError(f"{source} cannot be loaded: {first}") from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UsageError(
            f"{source} is no local path, and the hub does not give it{offline}: {first} "
            "Check the name and the network, or give a local folder."
        ) from error
    except RuntimeError as error:
        raise CompressError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; errors still raise."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The GGUF reader draws its bar by tqdm itself, which transformers' own switch does not reach.
    own_bar: Any = vars(gguf_reader).get("tqdm")
    if own_bar is not None:
        vars(gguf_reader)["tqdm"] = functools.partial(own_bar, disable=True)
    try:
        yield
    finally:
        if own_bar is not None:
            vars(gguf_reader)["tqdm"] = own_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
