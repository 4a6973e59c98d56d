"""The plan of a run: its memory against what tensors really take, on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_configs import BUILDERS, VOCAB, llama
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.footprint import LiveBytes, empty_data, without_data
from compress.heap import give_back, peak, resident, restart_peak
from compress.memory import MemoryModel, Stage
from compress.models import meta_model
from compress.plan import plan
from compress.recipe import LearnMaskRecipe
from compress.structure import decoder_blocks
from compress.weights import ParameterRef, by_parameter, find_weights
from maskllm.errors import MaskError
from maskllm.gumbel import logit_width
from maskllm.learner import Learner
from maskllm.optim import logit_dtype, state_bytes
from maskllm.parametrization import MaskTarget
from maskllm.patterns import Pattern
from maskllm.settings import LearnSettings

CPU = torch.device("cpu")
PATTERN = Pattern(2, 4)
LEAN = {"state": "8bit", "step_in_backward": True, "clip_by": "weight", "checkpoint_activations": True}


def recipe(folder: Path, model: Any = None, **learn: Any) -> LearnMaskRecipe:
    (model or llama()).config.save_pretrained(folder)
    return LearnMaskRecipe.model_validate(
        {
            "model": {"source": str(folder), "dtype": "float32", "device": "cpu"},
            "data": {"sources": [{"path": "asset:wikipedia"}], "seqlen": 16},
            "calibration": {"samples": 4},
            "learn": {"steps": 3, "batch": 2, "micro_batch": 2, "precision": "bf16", **learn},
            "evaluate": {"texts": {"t": {"source": {"path": "asset:wikitext2-test"}, "seqlen": 16}}, "every": 1},
        }
    )


def stages(wanted: LearnMaskRecipe, processes: int = 1, device: torch.device = CPU) -> dict[str, Stage]:
    model = meta_model(wanted.model.source)
    refs = find_weights(model)
    planned = MemoryModel(wanted, model, refs, by_parameter(refs), device, processes)
    return {stage.name: stage for stage in planned.stages()}


def first_share(processes: int, row_logits: int, row_bytes: int, rows: int) -> int:
    """Bytes of the first process's rows of a weight: shares are whole blocks of 256 logits."""
    unit = 256 // math.gcd(256, row_logits)
    return min(rows, unit * math.ceil(rows / (unit * processes))) * row_bytes


def learner(model: Any, settings: LearnSettings, parameters: list[ParameterRef] | None = None) -> Learner:
    parameters = parameters or by_parameter(find_weights(model))
    width = logit_width(PATTERN, settings.parametrization)
    targets = [MaskTarget(p.name, p.module, p.parameter_name, p.contracted_dim) for p in parameters]
    logits = {}
    for t in targets:
        shape = getattr(t.module, t.parameter_name).movedim(t.contracted_dim, -1).shape
        logits[t.name] = torch.zeros(*shape[:-1], shape[-1] // 4, width, dtype=logit_dtype(settings.state))
    accelerator = Accelerator(cpu=True, device_placement=False)
    blocks = [block.module for block in decoder_blocks(model)]
    return Learner(model, targets, PATTERN, settings, logits, {}, accelerator, blocks=blocks)


def saved_bytes(run: Learner, ids: Tensor) -> int:
    """Bytes of the distinct storages that autograd saves for the backward pass, the model's and the logits' own aside."""
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in run.model.buffers()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = run.losses(ids, 0.0)
    total = sum(size for place, size in saved.items() if place not in own)
    run.backward(loss)
    return total


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_forward_pass_keeps_is_what_autograd_saves(kind: str, bf16: bool) -> None:
    settings = LearnSettings(steps=1, batch=2, micro_batch=2, kl_weight=0.0, regulariser=0.0, bf16=bf16)
    ids = torch.zeros(2, 24, dtype=torch.int64)
    expected = saved_bytes(learner(BUILDERS[kind](), settings), ids)

    live = LiveBytes()
    model = BUILDERS[kind]()
    parameters = by_parameter(find_weights(model))
    with without_data(live, CPU):
        empty_data(model, None, CPU)
        run = learner(model, settings, parameters)
        before = sum(live.live.values())
        loss, record = run.losses(torch.zeros_like(ids), 0.0)
        kept = sum(live.live.values()) - before
        run.backward(loss)
        left = sum(live.live.values()) - before
    hidden = 2 * 23 * 32 * 4  # the loss keeps the gradient of the hidden states, which is no saved tensor
    assert expected <= kept <= 1.02 * expected + hidden + 4096
    assert kept > 0.98 * expected
    logits = sum(mask.logits.numel() for mask in run.weights.values())
    assert logits * 4 <= left <= logits * 4 + 4096  # their gradients, and nothing else
    del loss, record


def test_every_part_of_learning_is_counted(tmp_path: Path) -> None:
    standard = stages(recipe(tmp_path / "a", parametrization="patterns", checkpoint_activations=True, precision="fp32"))[
        "learning"
    ]
    weights = [p.numel() for p in llama().model.layers.parameters() if p.dim() == 2]
    logits = [n // 4 * 6 for n in weights]
    assert standard.parts["logits"] == 4 * sum(logits)
    assert standard.parts["moments"] == 8 * sum(logits)
    assert standard.parts["masks"] == sum(weights)
    assert standard.parts["model"] == 4 * sum(p.numel() for p in llama().parameters())
    assert standard.total == sum(standard.parts.values())


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
def test_the_state_of_learning_is_what_the_optimizer_keeps(tmp_path: Path, state: str) -> None:
    found = stages(recipe(tmp_path / "m", state=state))["learning"]
    weights = [p.numel() for p in llama().model.layers.parameters() if p.dim() == 2]
    assert found.parts["logits"] + found.parts["moments"] == sum(state_bytes(state, n) for n in weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_shares_are_planned_as_rows(tmp_path: Path, processes: int, kind: str) -> None:
    """Of the weights' rows; what lies outside of them is whole in each process."""
    model = BUILDERS[kind]()
    sizes = {"batch": 2 * processes, "state": "bfloat16", "checkpoint_activations": True}
    wanted = {shard: recipe(tmp_path / shard, model, shard=shard, **sizes) for shard in ("none", "logits", "weights")}
    found = {shard: stages(plan, processes)["learning"].parts for shard, plan in wanted.items()}
    parameters = by_parameter(find_weights(model))
    shapes = [p.refs[0].parameter.movedim(p.contracted_dim, -1).shape for p in parameters]
    masked = sum(math.prod(shape) for shape in shapes)
    own = {size: sum(first_share(processes, s[-1], size * s[-1], math.prod(s[:-1])) for s in shapes) for size in (2, 4)}
    assert found["none"]["logits"] == 2 * masked
    assert found["none"]["moments"] == 4 * masked
    for shard in ("logits", "weights"):
        assert found[shard]["logits"] == own[2]
        assert found[shard]["moments"] == 2 * own[2]
    total = sum(p.numel() for p in model.parameters())
    assert found["none"]["model"] == found["logits"]["model"] == 4 * total
    if processes == 1:
        assert found["weights"]["model"] == 4 * total
    else:
        buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
        assert found["weights"]["own rows of the frozen weights"] == own[4]
        assert found["weights"]["model"] == 4 * (total - masked) + buffers


def test_gathered_weights_are_those_of_one_block(tmp_path: Path) -> None:
    """With two blocks as with six: nothing whole outlives the block that reads it."""
    whole = []
    for layers in (2, 6):
        wanted = recipe(tmp_path / str(layers), llama(num_hidden_layers=layers), shard="weights", batch=4, **LEAN | {"clip": 0})
        quiet = wanted.model_copy(update={"evaluate": wanted.evaluate.model_copy(update={"texts": {}, "every": 0})})
        parts = stages(quiet, 2)["learning"].parts
        whole.append(parts["rows of all processes"] + parts.get("masked weights", 0))
    block = sum(p.numel() for p in llama().model.layers[0].parameters() if p.dim() == 2)
    assert whole[0] == whole[1] < 2 * 4 * block


def test_until_weights_are_shared_out_a_gpu_holds_one_block(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "m", shard="weights", checkpoint_activations=True, batch=4)
    model = meta_model(wanted.model.source)
    refs = find_weights(model)
    planned = MemoryModel(wanted, model, refs, by_parameter(refs), torch.device("cuda"), 2)
    block = sum(p.numel() for p in llama().model.layers[0].parameters())
    outside = sum(p.numel() for p in llama().parameters()) - 2 * block
    for stage in (planned._loading(), planned._one_shot("magnitude", LiveBytes())):
        assert stage.parts == {"block that runs": 4 * block, "model outside of its blocks": 4 * outside}  # copies are the host's


def test_several_processes_are_told_apart(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "m", shard="logits", batch=4)
    assert "memory of the process (the first of 2), in bytes" in plan(wanted, 2).describe()
    assert plan(wanted, 2).to_json()["processes"] == 2
    with pytest.raises(UsageError, match="runs in one process, not in 2"):
        plan(recipe(tmp_path / "n", scope="block"), 2)
    with pytest.raises(MaskError, match="not a multiple of micro_batch 2 times 3 processes"):
        plan(wanted, 3)


def test_lean_settings_are_leaner(tmp_path: Path) -> None:
    sizes = {"batch": 8, "micro_batch": 8}
    deep = {"num_hidden_layers": 6}
    plain = recipe(tmp_path / "a", llama(**deep), **sizes)
    quiet = {"evaluate": plain.evaluate.model_copy(update={"every": 0})}  # else the peak is the evaluation amid learning
    standard = stages(plain.model_copy(update=quiet))["learning"]
    lean = stages(recipe(tmp_path / "b", llama(**deep), **sizes, **LEAN).model_copy(update=quiet))["learning"]
    weights = sum(p.numel() for p in llama(**deep).model.layers.parameters() if p.dim() == 2)
    assert lean.parts["activations"] < 0.6 * standard.parts["activations"]
    assert standard.parts["logits"] + standard.parts["moments"] == 12 * weights
    assert lean.parts["logits"] + lean.parts["moments"] < 4.1 * weights
    assert lean.parts.get("gradients of logits", 0) <= 4 * 48 * 32
    assert lean.parts.get("masked weights", 0) < standard.parts["masked weights"] / 2


@pytest.mark.parametrize("kind", [k for k in BUILDERS if k not in ("llama", "gpt2", "gemma3")])
def test_every_architecture_can_be_planned(tmp_path: Path, kind: str) -> None:
    found = stages(recipe(tmp_path / kind, BUILDERS[kind](), **LEAN))
    assert set(found) == {"loading", "one-shot sparsegpt", "evaluation", "learning"}
    assert all(stage.parts["model"] == found["loading"].parts["model"] for stage in found.values())
    assert found["learning"].parts["activations"] > 0


def test_block_by_block(tmp_path: Path) -> None:
    wanted = recipe(
        tmp_path / "m", scope="block-then-model", block={"sequences": 8, "held_out": 4, "micro_batch": 4, "steps": 5, "batch": 4}
    )
    found = stages(wanted)
    assert found["learning block by block"].parts["logits"] * 2 == found["learning"].parts["logits"]  # one of two blocks
    assert found["learning block by block"].parts["hidden states"] == 2 * 12 * 16 * 32 * 4
    planned = plan(wanted)
    assert planned.block_steps == 10
    assert planned.block_tokens == 10 * 4 * 16
    only = plan(recipe(tmp_path / "n", scope="block"))
    assert only.steps == only.tokens == 0
    assert "learning" not in [stage.name for stage in only.stages]


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
def test_the_state_of_a_block_is_what_its_optimizer_keeps(tmp_path: Path, state: str) -> None:
    block = {"sequences": 8, "held_out": 4, "micro_batch": 4, "batch": 4}
    lean = {"step_in_backward": True, "clip_by": "weight"} if state == "8bit" else {}
    found = stages(recipe(tmp_path / "m", scope="block", block=block, state=state, **lean))["learning block by block"]
    weights = [p.numel() for p in llama().model.layers[0].parameters() if p.dim() == 2]
    assert found.parts["logits"] + found.parts["moments"] == sum(state_bytes(state, n) for n in weights)  # type: ignore[arg-type]
    assert found.parts.get("gradients of logits", 0) <= max(weights) * 4 if lean else sum(weights) * 4


def test_one_shot_stages_follow_the_recipe(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "m")
    names = [s for s in stages(wanted) if s.startswith("one-shot")]
    assert names == ["one-shot sparsegpt"]
    more = wanted.model_copy(
        update={"evaluate": wanted.evaluate.model_copy(update={"baselines": ["dense", "ria", "sparsegpt-update"]})}
    )
    assert [s for s in stages(more) if s.startswith("one-shot")] == ["one-shot ria", "one-shot sparsegpt"]


def test_a_plan_leaves_nothing_behind(tmp_path: Path) -> None:
    """Caches of tables must not keep tensors without data: a real run in the same process works as before."""
    plan(recipe(tmp_path / "m", **LEAN))
    assert PATTERN.candidates().sum() == 12
    settings = LearnSettings(steps=2, batch=2, micro_batch=2, parametrization="scores", state="8bit", kl_weight=1.0)
    run = learner(llama(), settings)
    losses = [r.loss for r in run.steps(lambda step, size: torch.randint(VOCAB, (size, 16)))]
    assert all(0 < loss < 100 for loss in losses)


def test_the_plan_as_text_and_as_json(tmp_path: Path) -> None:
    found = plan(recipe(tmp_path / "m"))
    again = json.loads(json.dumps(found.to_json()))
    assert again["bytes_peak"] == max(stage["bytes"] for stage in again["stages"])
    assert again["weights"] == sum(p.numel() for p in llama().model.layers.parameters() if p.dim() == 2)
    text = found.describe()
    assert f"{found.peak.total:,}  {found.peak.name} (the peak)" in text
    assert "3 steps end to end" in text


def test_what_cannot_be_planned_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(tmp_path / "m")
    model = meta_model(wanted.model.source)
    refs = find_weights(model)

    def forward(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the output shape depends on data")

    monkeypatch.setattr(type(model.get_decoder()), "forward", forward)
    with pytest.raises(CompressError, match="cannot be planned: its forward pass needs data"):
        MemoryModel(wanted, model, refs, by_parameter(refs), CPU).stages()
    with pytest.raises(UsageError, match="matches no weight"):
        plan(wanted.model_copy(update={"weights": wanted.weights.model_copy(update={"include": ["*.nothing.*"]})}))


def test_the_process_tells_its_memory() -> None:
    size = 256 << 20
    held = torch.ones(size, dtype=torch.uint8)
    assert resident() > size
    assert peak() >= resident() - (32 << 20)
    before = resident()
    del held
    give_back()
    assert resident() < before - size // 2
    if restart_peak():
        assert peak() < before - size // 2
