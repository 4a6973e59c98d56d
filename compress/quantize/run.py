"""`compress profile-experts`, `quantize` and `run`: from a recipe to a quantised model, its measurements and a report.

The run directory holds profile/ (what every width costs every expert), experts.json (the same for `compress allocate-bits --stats`),
bits.json (what was chosen), quantized/ (codes), and with `run` model/, the export. Each stage is there once it is complete; a run that was
interrupted goes on with the first layer that is missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress import console
from compress.activations import scratch_folder
from compress.errors import UsageError
from compress.interrupt import Interrupted, StopFlag, stoppable
from compress.masks import open_mask
from compress.moe.allocate import Budget, Limit
from compress.moe.assign import Assignment, assign, from_layers, statistics, statistics_json
from compress.moe.profile import profile_experts
from compress.moe.profile_store import LayerProfile, ProfileStore
from compress.moe.tune import tune_routers
from compress.quantize.model import quantize_model, rest_widths
from compress.quantize.report import write_profile_report, write_quantize_report
from compress.quantize.session import QuantizeSession, other_size, prepare
from compress.quantize.store import QuantizedStore
from compress.recipe_file import dump_recipe
from compress.recipe_quantize import QuantizeRecipe
from compress.rundir import RunDir, write_atomic
from compress.settings import settled

Stage = Literal["profile", "quantize", "run"]
Widths = dict[int, list[dict[str, tuple[int, int]]]]


@dataclass(frozen=True)
class QuantizeResult:
    """What a run leaves. rows: as in summary.json, none after `profile`; profiles: none where widths came from a file; facts: sizes."""

    run: Path
    rows: list[dict[str, Any]]
    profiles: list[LayerProfile]
    facts: dict[str, Any]


def run_recipe(recipe: QuantizeRecipe, out: Path, *, stage: Stage, resume: bool, resume_command: str) -> QuantizeResult:
    """Run a recipe in the folder `out`, up to a stage. A run directory that `profile-experts` has left is taken up by the later stages.

    Raises UsageError before anything is written when the recipe does not fit model or text; Interrupted after SIGINT or SIGTERM, with all
    complete layers saved.
    """
    recipe, run = settled(recipe), RunDir(out)
    profiled = (out / "experts.json").is_file() and not run.summary.exists()
    run = RunDir.check(out, dump_recipe(recipe), resume or (profiled and stage != "profile"))
    if recipe.allocate.bits_file is not None and stage == "profile":
        raise UsageError(
            "allocate.bits_file gives the widths, so there is nothing to profile; take it out, or `compress quantize`"
        )
    session = prepare(recipe)
    if recipe.tune.steps and session.streamed.streamed:
        raise UsageError("tuning routers needs the whole model in memory: set stream to false, or tune.steps to 0")
    run.create(dump_recipe(recipe))
    try:
        with stoppable() as stop:
            return _stages(session, run, stage, stop, resume_command)
    finally:
        session.close()


def _stages(session: QuantizeSession, run: RunDir, stage: Stage, stop: StopFlag, resume_command: str) -> QuantizeResult:
    recipe = session.recipe

    def stopped(where: str) -> Interrupted:
        return Interrupted(f"stopped {where}; complete layers are saved. Continue with:\n  {resume_command}")

    profiles = [] if recipe.allocate.bits_file else _profile(session, run, stop)
    if profiles is None:
        raise stopped("while profiling")
    if stage == "profile":
        write_profile_report(run, recipe, profiles)
        return QuantizeResult(run.path, [], profiles, {})
    rest = rest_widths(session.refs, recipe.rest, recipe.quantizer.group_size)
    _check_masked(session, rest)
    widths, facts = _allocate(session, run, profiles, rest)
    store = QuantizedStore(run.path / "quantized")
    with console.task("quantising", len(session.streamed.blocks)) as bar:
        if not quantize_model(
            session.streamed,
            session.refs,
            session.batches,
            widths,
            rest,
            session.quantizer(),
            store,
            progress=lambda done, total, note: bar.update(done, note, total),
            asked_to_stop=lambda: stop.asked,
        ):
            raise stopped("while quantising")
    _warn_of_remarks(session, store)
    if not _tune(session, store, stop):
        raise stopped("while tuning routers")
    rows: list[dict[str, Any]] = run.known("rows") or []
    if not rows:
        rows.append(session.measure("original", None))
        if session.texts and recipe.mask is not None:
            rows.append(session.measure("masked", session.streamed))
        if session.texts:
            with session.quantized(store) as changed:
                rows.append(session.measure("quantized", changed))
        run.know("rows", rows)
    write_atomic(run.path / "sizes.json", json.dumps(facts, indent=1) + "\n")
    if stage == "run" and recipe.export.format != "none":
        from compress.export.quantized import export_quantized

        with console.task("packing", 1) as bar:
            export_quantized(
                run.path,
                run.path / "model",
                recipe.export.format,
                promote=recipe.export.promote,
                metrics=rows,
                overwrite=True,
                progress=lambda done, total, note: bar.update(done, note, total),
            )
    write_quantize_report(run, recipe, rows, profiles, widths, facts, _notes(session, store))
    write_atomic(run.summary, json.dumps(rows, indent=1))
    return QuantizeResult(run.path, rows, profiles, facts)


def _profile(session: QuantizeSession, run: RunDir, stop: StopFlag) -> list[LayerProfile] | None:
    """The profiles of all layers, measured or read; None when it was asked to stop."""
    recipe = session.recipe
    folder = Path(recipe.profile.folder) if recipe.profile.folder else run.path / "profile"
    store = ProfileStore(folder, session.identity)
    layers = sorted(session.mixtures)
    if not all(store.has(layer) for layer in layers):
        quantizer = session.quantizer(recipe.profile.method)
        with scratch_folder(run.path / "scratch", recipe.cache) as scratch, console.task("profiling", 1) as bar:
            done = profile_experts(
                session.streamed,
                session.refs,
                session.batches,
                recipe.pairs(),
                quantizer,
                store,
                fisher=recipe.allocate.mode == "fisher",
                cache=recipe.cache,
                scratch=scratch,
                progress=lambda done, total, note: bar.update(done, note, total),
                asked_to_stop=lambda: stop.asked,
            )
        if not done:
            return None
    profiles = [store.read(layer) for layer in layers]
    starved = [
        f"layers.{p.layer}.experts.{e}" for p in profiles for e in range(p.experts) if p.frequency[e] < recipe.profile.min_tokens
    ]
    if starved:
        console.log.print(
            f"[yellow]{len(starved)} experts got fewer than {recipe.profile.min_tokens} calibration tokens ({', '.join(starved[:4])}"
            f"{', ...' if len(starved) > 4 else ''}): their costs say little; calibrate on more or other text[/]",
            soft_wrap=True,
        )
    groups = {group for _, group in recipe.pairs()}
    if len(groups) == 1 and not (run.path / "experts.json").is_file():
        kind = session.quantizer().kind
        zero = {"float": 16, "asymmetric": None}.get(kind, 0)  # None: as wide as the codes
        found = statistics(profiles, groups.pop(), zero_bits=zero)
        write_atomic(run.path / "experts.json", json.dumps(statistics_json(found)) + "\n")
    return profiles


def _allocate(
    session: QuantizeSession, run: RunDir, profiles: list[LayerProfile], rest: dict[str, tuple[int, int]]
) -> tuple[Widths, dict[str, Any]]:
    """The width of every expert's matrices, and sizes; written to bits.json."""
    wanted = session.recipe.allocate
    other_weights, other_bytes = other_size(session, rest)
    facts: dict[str, Any] = {}
    if wanted.bits_file is not None:
        widths = _from_file(session, Path(wanted.bits_file))
    else:
        found = assign(
            profiles,
            _budget(session, other_weights, other_bytes),
            session.quantizer(),
            mode=wanted.mode,
            granularity=wanted.granularity,
            limits=[Limit(glob, floor=bits) for glob, bits in wanted.floor.items()]
            + [Limit(glob, ceiling=bits) for glob, bits in wanted.ceiling.items()],
            protect=wanted.protect,
            protect_super=wanted.protect_super_experts,
            exponents=wanted.exponents,
        )
        widths = found.widths
        facts |= _said(found)
    facts |= sizes(session, widths, other_weights, other_bytes)
    chosen = {str(layer): [{role: list(pair) for role, pair in e.items()} for e in experts] for layer, experts in widths.items()}
    write_atomic(run.path / "bits.json", json.dumps({**facts, "widths": chosen}) + "\n")
    console.log.print(
        f"experts: {facts['average_bits']:.3f} average bits, {facts['expert_bytes']:,} bytes; whole model {facts['bytes']:,} bytes, "
        f"{facts['bits_per_weight']:.3f} bits per weight"
    )
    return widths, facts


def _budget(session: QuantizeSession, other_weights: int, other_bytes: int) -> Budget:
    wanted = session.recipe.allocate
    if wanted.average_bits is not None:
        return Budget(wanted.average_bits)
    if wanted.max_bytes is not None:
        return Budget(wanted.max_bytes, "bytes")
    assert wanted.bits_per_weight is not None
    return Budget(wanted.bits_per_weight, "bits-per-weight", other_weights, other_bytes)


def _said(found: Assignment) -> dict[str, Any]:
    if found.protected:
        console.log.print(f"super experts, which get their widest candidate: {', '.join(found.protected)}")
    return {"allocation": found.allocation.to_json(), "super_experts": found.protected}


def _from_file(session: QuantizeSession, file: Path) -> Widths:
    try:
        layers = json.loads(file.read_text(encoding="utf-8"))["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is not what `compress allocate-bits --out` writes: {error}") from None
    shapes = {index: (len(m.experts), m.roles) for index, m in session.mixtures.items()}
    return from_layers(layers, shapes, session.recipe.quantizer.group_size, str(file))


def sizes(session: QuantizeSession, widths: Widths, other_weights: int, other_bytes: int) -> dict[str, Any]:
    """Average bits of the experts' codes, bytes of the experts and of all, bits per weight of the whole model."""
    from compress.moe.assign import matrix_bytes

    quantizer = session.quantizer()
    bits = weights = nbytes = 0
    for layer, experts in widths.items():
        for expert, own in zip(session.mixtures[layer].experts, experts, strict=True):
            for role, (width, group) in own.items():
                rows, columns = expert.refs[role].shape
                bits += width * rows * columns
                weights += rows * columns
                nbytes += matrix_bytes(quantizer.grid(width, group), rows, columns)
    total = weights + other_weights
    before = sum(p.numel() * (session.stored_type or p.dtype).itemsize for p in session.streamed.model.parameters())
    return {
        "average_bits": bits / weights,
        "expert_weights": weights,
        "expert_bytes": nbytes,
        "weights": total,
        "bytes": nbytes + other_bytes,
        "bits_per_weight": 8 * (nbytes + other_bytes) / total,
        "original_bytes": before,
    }


def _notes(session: QuantizeSession, store: QuantizedStore) -> dict[str, dict[str, Any]]:
    """What became of every matrix, by name."""
    found: dict[str, dict[str, Any]] = {}
    for block in session.streamed.blocks:
        found |= store.facts(block.index).get("matrices", {})
    return found


def _check_masked(session: QuantizeSession, rest: dict[str, tuple[int, int]]) -> None:
    """Raise UsageError when the mask prunes what is not quantised: its pruned values would be nowhere."""
    if session.recipe.mask is None:
        return
    masked = set(open_mask(Path(session.recipe.mask)).masks)
    left = [ref.name for ref in session.refs if ref.full_name in masked and ref.expert is None and ref.name not in rest]
    if left:
        raise UsageError(f"the mask prunes {left[0]}, which `rest` leaves as it is: give it a width, or take it out of the mask")


def _warn_of_remarks(session: QuantizeSession, store: QuantizedStore) -> None:
    remarks = {name: note["remark"] for name, note in _notes(session, store).items() if note["remark"]}
    for text in sorted(set(remarks.values()))[:6]:
        names = [name for name, remark in remarks.items() if remark == text]
        console.log.print(
            f"[yellow]{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)}): {text}[/]", soft_wrap=True
        )


def _tune(session: QuantizeSession, store: QuantizedStore, stop: StopFlag) -> bool:
    """Tune the routers if the recipe says so and it is not done; False when it was asked to stop."""
    wanted = session.recipe.tune
    if not wanted.steps or store.replaced():
        return True
    with session.quantized(store) as changed, console.task("tuning routers", wanted.steps) as bar:
        values = tune_routers(
            changed.model,
            session.original.model,
            session.routers,
            session.blocks.batch,
            wanted,
            progress=lambda done, total, note: bar.update(done, note, total),
            asked_to_stop=lambda: stop.asked,
        )
    if values is None:
        return False
    store.write_replaced(values)
    return True
