"""A routing on disk: `routing.json` says what it is and for which model, `routing.safetensors` holds the numbers of its decisions.

Both lie beside a checkpoint (`compress export` puts them there), or in the run directory of `compress learn-routing`.

routing.json       format, version, method (otp, odp, top-p, top-k), rank (otp), protect (odp), mixtures in order (name, experts, top_k, hidden,
                   renormalise), activation (met on the calibration text), sha256 of routing.safetensors, and what is for the reader alone:
                   model, tool, recipe
routing.safetensors  `<mixture>.<number of its decision>` in float32 (int64 for `keep`), and `<mixture>.fingerprint`: 256 weights of the
                   model's own router, by which a routing of another model is told
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compress import __version__
from compress.checkpoint import read_json
from compress.errors import CompressError, UsageError
from compress.fallback import tell_missing
from compress.routing.decisions import Decision, make_decision
from compress.routing.gate import Routing, attach
from compress.routing.mixtures import Mixture, expert_modules
from compress.routing.router import TopAnyRouter
from compress.rundir import write_atomic
from maskllm.safefile import Entry, write_safetensors

JSON_NAME = "routing.json"
TENSORS_NAME = "routing.safetensors"
FORMAT, VERSION = "compress-routing", 1
_SAMPLES = 256
_ALIKE = (
    0.9  # cosine of the model's router weights to the recorded ones: quantising a router leaves it above, another model is near 0
)


def save(folder: Path, routing: Routing, facts: Mapping[str, Any]) -> None:
    """Write an attached routing into a folder. facts: more entries of routing.json (activation, model, recipe, ...)."""
    entries = []
    for gate in routing.gates:
        tensors = {name: value.detach().cpu() for name, value in gate.decision.state_dict().items()}
        sample = router_sample(gate.mixture.module, gate.mixture.name, routing.model)
        if sample is not None:
            tensors["fingerprint"] = sample
        for name, value in tensors.items():
            kind = torch.float32 if value.is_floating_point() else value.dtype
            entries.append(Entry.of(f"{gate.mixture.name}.{name}", value.to(kind)))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TENSORS_NAME, entries, {"format": FORMAT})
    first = routing.gates[0]
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "method": routing.method,
        **({"rank": first.decision.rank} if routing.method == "otp" else {}),
        "protect": first.protect,
        "mixtures": [
            {"name": m.name, "experts": m.experts, "top_k": m.top_k, "hidden": m.hidden, "renormalise": m.renormalise}
            for m in routing.mixtures
        ],
        "sha256": _digest(folder / TENSORS_NAME),
        "tool": f"maskllm-compress {__version__}",
        **facts,
    }
    write_atomic(folder / JSON_NAME, json.dumps(description, indent=1) + "\n")


def attach_saved(model: nn.Module, folder: str | Path) -> Routing | None:
    """Attach the routing that lies in a folder to a loaded model; None when none lies there.

    Decisions are made in float64, so that the order in which a matrix product sums, which may depend on the number of tokens, does not
    decide. Raises UsageError for another version, damaged files, and a routing that was made for another model.
    """
    folder = Path(folder)
    if not (folder / JSON_NAME).is_file():
        return None
    description = read_description(folder)
    found = expert_modules(model)
    mixtures = _mixtures(description, found, folder)
    decisions: dict[str, Decision] = {}
    samples: list[tuple[Tensor, Tensor]] = []
    try:
        with safe_open(folder / TENSORS_NAME, "pt") as file:
            for mixture in mixtures:
                decision = make_decision(description["method"], mixture, rank=description.get("rank", 1))
                decision.load_state_dict({name: file.get_tensor(f"{mixture.name}.{name}") for name in decision.state_dict()})
                decisions[mixture.name] = frozen(decision)
                own = router_sample(mixture.module, mixture.name, model)
                recorded = f"{mixture.name}.fingerprint"
                if own is not None and recorded in file.keys():  # noqa: SIM118
                    samples.append((own, file.get_tensor(recorded)))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UsageError(f"{folder / TENSORS_NAME} does not hold what {JSON_NAME} says: {str(error).splitlines()[0]}") from error
    _check_same_model(samples, description, folder)
    if description["method"] == "otp" and next(model.parameters()).device.type == "cpu":
        tell_missing("routing")
    return attach(model, mixtures, decisions, description["method"], description["protect"])


def read_description(folder: Path) -> dict[str, Any]:
    """The checked content of routing.json; raises UsageError for one that this release cannot read, or whose tensors are others."""
    description = read_json(folder / JSON_NAME)
    if description.get("format") != FORMAT or description.get("version") != VERSION:
        raise UsageError(
            f"{folder / JSON_NAME} is {description.get('format')!r} of version {description.get('version')!r}; this release reads "
            f"{FORMAT!r} of version {VERSION}"
        )
    missing = {"method", "protect", "mixtures", "sha256"} - description.keys()
    if missing:
        raise UsageError(f"{folder / JSON_NAME} does not say {', '.join(sorted(missing))}; it is damaged")
    if not (folder / TENSORS_NAME).is_file():
        raise UsageError(f"{folder} has {JSON_NAME} but no {TENSORS_NAME}; copy both")
    if _digest(folder / TENSORS_NAME) != description["sha256"]:
        raise UsageError(
            f"{folder / TENSORS_NAME} is not the file that {JSON_NAME} was written with: it is damaged, or of another routing"
        )
    return description


def frozen(decision: Decision) -> Decision:
    """A decision ready for inference: in float64, without gradients."""
    decision.double().requires_grad_(False).eval()
    if isinstance(decision, TopAnyRouter):
        decision.fold()
    return decision


def router_sample(module: nn.Module, name: str, model: nn.Module) -> Tensor | None:
    """256 weights of the model's router beside an experts module, float32, evenly spread; None where it has no plain matrix `[E, hidden]`."""
    parent = model.get_submodule(name.rpartition(".")[0])
    experts: Any = module.num_experts
    within = {id(p) for p in module.parameters()}
    for parameter in parent.parameters():
        plain = parameter.dim() == 2 and parameter.shape[0] == experts and parameter.is_floating_point() and not parameter.is_meta
        if plain and id(parameter) not in within:
            flat = parameter.detach().flatten()
            at = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).long()
            return flat[at.to(flat.device)].float().cpu()
    return None


def _mixtures(description: Mapping[str, Any], found: Sequence[tuple[str, nn.Module, nn.Module]], folder: Path) -> list[Mixture]:
    """The mixtures of the model, as routing.json describes them."""
    modules = {name: (module, block) for name, module, block in found}
    mixtures = []
    try:
        for entry in description["mixtures"]:
            module, block = modules.pop(entry["name"])
            experts: Any = module.num_experts
            if experts != entry["experts"]:
                raise UsageError(
                    f"the routing in {folder} belongs to another model: {entry['name']} has {experts} experts here, {entry['experts']} there"
                )
            numbers = (int(entry["experts"]), int(entry["top_k"]), int(entry["hidden"]), bool(entry["renormalise"]))
            mixtures.append(Mixture(entry["name"], module, block, *numbers))
    except (KeyError, TypeError) as error:
        raise UsageError(f"the routing in {folder} belongs to another model: this one has no mixture {error}") from error
    if modules:
        raise UsageError(f"the routing in {folder} belongs to another model: it knows nothing of {next(iter(modules))}")
    return mixtures


def _check_same_model(samples: Sequence[tuple[Tensor, Tensor]], description: Mapping[str, Any], folder: Path) -> None:
    if not samples:
        return
    if all(own.shape == recorded.shape for own, recorded in samples):
        own, recorded = (torch.cat(side) for side in zip(*samples, strict=True))
        if torch.nn.functional.cosine_similarity(own, recorded, dim=0) >= _ALIKE:
            return
    raise UsageError(
        f"the routing in {folder} belongs to another model ({description.get('model', 'unnamed')}): the routers' weights differ"
    )


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise CompressError(f"cannot read {file}: {error}") from error
