"""Put a routing beside a copy of its checkpoint, as a folder that `from_pretrained` loads after `import compress.hf`.

The config.json of a dense checkpoint gets a
`quantization_config` that says "compress-routing": without `import compress.hf` transformers warns of it and runs the model unpruned.
That of a checkpoint which this tool quantised or packed stays as it is; its loader looks for a routing by itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compress import __version__
from compress.checkpoint import SIDECAR_NAME, checkpoint_files, read_json
from compress.errors import UsageError, VerificationError
from compress.export.folder import output_folder
from compress.export.source import download
from compress.models import resolve_source
from compress.routing.quantizer import QUANT_METHOD
from compress.routing.storage import JSON_NAME, TENSORS_NAME, read_description

_OURS = "compress-"  # what the quant_method of this tool's formats begins with


def export_routing(
    run: Path, out: Path, *, model: str | None = None, revision: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write `out`: the checkpoint of `model` (by default the one that the routing names) with the routing in `run`.

    Returns the description in routing.json. Raises UsageError for a model that is no safetensors checkpoint or is quantised by other
    software, and VerificationError when what was written is not what was read.
    """
    description = read_description(run)
    name = model or description.get("model", "")
    if not name:
        raise UsageError(f"{run / JSON_NAME} does not say which model it belongs to; give --model")
    place = resolve_source(name)
    if place.gguf_file is not None:
        raise UsageError(f"{name} is a GGUF file, which has no place for a routing; export from a safetensors checkpoint")
    source = download(name, revision) if place.folder is None else place.folder
    config = read_json(source / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and not str(method).startswith(_OURS):
        raise UsageError(
            f"{name} is quantised by {method!r}, whose loader knows nothing of routing; export from a dense checkpoint, or from one of this tool"
        )
    weights = checkpoint_files(source)
    with output_folder(out, overwrite=overwrite, source=source) as partial:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in (JSON_NAME, TENSORS_NAME, SIDECAR_NAME, "README.md"):
                shutil.copyfile(file, partial / file.name)
        if method is None:
            text = json.dumps(config | {"quantization_config": {"quant_method": QUANT_METHOD}}, indent=2)
            (partial / "config.json").unlink()
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        for part in (JSON_NAME, TENSORS_NAME):
            shutil.copyfile(run / part, partial / part)
        facts = {
            "tool": f"maskllm-compress {__version__}",
            "format": QUANT_METHOD,
            "source": name,
            "method": description["method"],
        }
        (partial / SIDECAR_NAME).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        (partial / "README.md").write_text(_card(name, place.folder is None, description, method), encoding="utf-8")
        _verify(run, partial, [file.name for file in weights], source)
    return description


def _verify(run: Path, folder: Path, weights: list[str], source: Path) -> None:
    """The routing reads back bit for bit, and every file of weights is there whole."""
    read_description(folder)
    with safe_open(run / TENSORS_NAME, "pt") as ours, safe_open(folder / TENSORS_NAME, "pt") as written:
        names = list(ours.keys())
        if names != list(written.keys()) or not all(torch.equal(ours.get_tensor(n), written.get_tensor(n)) for n in names):
            raise VerificationError(f"{TENSORS_NAME} was not written as it was read; is the disk full?")
    for name in weights:
        if (folder / name).stat().st_size != (source / name).stat().st_size:
            raise VerificationError(f"{name} was not copied whole; is the disk full?")


def _card(source: str, on_hub: bool, description: dict[str, Any], method: str | None) -> str:
    base = f"base_model: {source}\n" if on_hub else ""
    mixtures = description["mixtures"]
    share = description.get("activation")
    runs = f"; {100 * share:.1f} % of the routed experts ran on its calibration text" if share is not None else ""
    plain = "the weights are those of the original" if method is None else f"the weights are those of the {method} checkpoint"
    lines = [
        f"---\n{base}library_name: transformers\ntags: [mixture-of-experts, expert-pruning, top-any-routing]\n---\n",
        f"# {Path(source).name.removeprefix('asset:')}, routed\n",
        f"For every token a decision ({description['method']}) says how many of its {mixtures[0]['top_k']} experts run, in {len(mixtures)} "
        f"mixtures{runs}. Nothing else changed: {plain}. Made by maskllm-compress {__version__} from `{source}`.\n",
        "## Loads in, is faster in\n",
        "| software | loads | skips |\n| --- | --- | --- |",
        "| this tool: `compress generate`, `compress eval` | yes | yes |",
        "| transformers after `import compress.hf`, and what loads through it (lm-eval) | yes | yes, with eager or grouped_mm experts |",
    ]
    if method is None:
        lines += [
            "| transformers without that import | yes, with a warning | no |",
            "| vLLM, SGLang, llama.cpp | take quantization_config out of config.json | no |",
        ]
    if description.get("recipe"):
        lines.append(f"\n## Recipe\n\n```yaml\n{description['recipe']}```")
    return "\n".join(lines) + "\n"
