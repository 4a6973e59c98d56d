"""Calibration on images with text: a JSON Lines file, made into a vision-language model's keyword arguments by its own processor."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.models import LoadedModel, resolve_source
from compress.recipe_quantize import ImagesSection

_EXTRA = "pip install 'maskllm-compress[vision]' (with a CPU build of torch, torchvision from the same index as torch)"


def image_batches(
    section: ImagesSection, loaded: LoadedModel, *, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> list[dict[str, Tensor]]:
    """The keyword arguments of one forward pass for each sample of an images section: `input_ids` int64 `[1, length]`, and what else
    the model's processor makes (pixel values, grids, masks); lengths differ. Floating-point tensors are in the model's type.

    Of more records than `section.samples`, these are chosen by the seed. A processor with a chat template gets the image and the text as
    one turn of the user; another gets the text with its image token in front, unless it is in the text.
    Raises UsageError for records or images that cannot be read, a model without a processor, and packages that it needs.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UsageError(f"calibration on images needs Pillow: {_EXTRA}")
    records = read_records(section)
    if section.samples > len(records):
        raise UsageError(f"images.samples is {section.samples}, but {section.path} holds only {len(records)} records")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[: section.samples]
    processor = _load_processor(loaded, revision, trust_remote_code)
    return [_inputs(processor, image, text, loaded.model.dtype) for image, text in (records[i] for i in order.tolist())]


def read_records(section: ImagesSection) -> list[tuple[Path, str]]:
    """Image file and text of every record. Raises UsageError with the line of a faulty one."""
    file = Path(section.path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as JSON Lines: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON: {error}") from error
        for field in (section.image_field, section.prompt_field):
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise UsageError(f"{where} has no text in the field {field!r}")
        image = file.parent / record[section.image_field]
        if not image.is_file():
            raise UsageError(f"{where}: there is no image {image}")
        found.append((image, record[section.prompt_field]))
    return found


def _load_processor(loaded: LoadedModel, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    location = str(loaded.folder) if loaded.folder is not None else resolve_source(loaded.source).location
    try:
        processor = AutoProcessor.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    except ImportError as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "a package is missing")
        raise UsageError(f"the processor of {loaded.source} needs packages that are not here ({first}): {_EXTRA}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(f"{loaded.source} has no processor for images that can be loaded: {first}") from error
    if getattr(processor, "image_processor", None) is None:  # transformers falls back to the tokenizer alone
        raise UsageError(
            f"{loaded.source} has no processor for images (preprocessor_config.json); take `images` out of the recipe"
        )
    return processor


def _inputs(processor: Any, file: Path, text: str, dtype: torch.dtype) -> dict[str, Tensor]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"{file} cannot be read as an image: {error}") from error
    if getattr(processor, "chat_template", None):
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}
        made = processor.apply_chat_template([turn], tokenize=True, return_dict=True, return_tensors="pt")
    else:
        token = getattr(processor, "image_token", None)
        made = processor(images=[image], text=text if token is None or token in text else token + text, return_tensors="pt")
    unusable = [name for name, value in made.items() if not isinstance(value, Tensor)]
    if unusable:
        raise CompressError(f"{type(processor).__name__} gives {unusable[0]!r} as no tensor, which calibration does not handle")
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}
