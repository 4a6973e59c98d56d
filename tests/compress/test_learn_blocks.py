"""Learning block by block on tiny models: right inputs and targets, one block at a time, resumable to the bit; and by the command line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
from tiny_configs import BUILDERS, VOCAB
from torch import Tensor
from torch.nn.utils import parametrize
from typer.testing import CliRunner

from compress import activations
from compress.activations import Activations, scratch_folder
from compress.blocks import learn_blocks
from compress.cli import app
from compress.data import TokenBlocks
from compress.errors import CompressError, UsageError
from compress.experts import count_tokens, tokens_by_expert
from compress.interrupt import Interrupted, StopFlag
from compress.models import LoadedModel
from compress.prune import prune_one_shot
from compress.recipe_file import check_recipe
from compress.rundir import RunDir
from compress.session import Session
from compress.weights import by_parameter, find_weights
from maskllm.errors import MaskError
from maskllm.patterns import Pattern
from maskllm.storage import load_masks, mask_digest

PATTERN = Pattern(2, 4)
LENGTH = 24
BLOCK: dict[str, Any] = {
    "steps": 5,
    "batch": 8,
    "micro_batch": 4,
    "sequences": 40,
    "held_out": 8,
    "learning_rate": 0.004,
    "min_tokens": 0,
}


def session(name: str = "llama", learn: dict[str, Any] | None = None, seed: int = 0, model: Any = None, **block: Any) -> Session:
    """As `compress.session.prepare` makes it, for a model and tokens of our own."""
    recipe = check_recipe(
        {
            "model": {"source": name},
            "data": {"sources": [{"path": "none"}], "seqlen": LENGTH},
            "learn": {"scope": "block", "precision": "fp32", "block": {**BLOCK, **block}, **(learn or {})},
            "seed": seed,
        },
        "test",
    )
    model = model or BUILDERS[name]()
    refs = find_weights(model)
    tokens = torch.randint(3, VOCAB, (3000,), generator=torch.Generator().manual_seed(0)).numpy()
    wanted = recipe.learn.block
    batches = list(TokenBlocks(tokens, LENGTH, seed + 2).batch(0, wanted.sequences + wanted.held_out).split(wanted.micro_batch))
    loaded = LoadedModel(model, None, name)  # type: ignore[arg-type]
    blocks = TokenBlocks(tokens, LENGTH, seed + 1)
    return Session(recipe, loaded, PATTERN, refs, by_parameter(refs), blocks, batches, batches, {})


def prior_of(made: Session) -> dict[str, Tensor]:
    return prune_one_shot(made.loaded.model, made.refs, PATTERN, "magnitude", []).masks


def run_in(folder: Path) -> RunDir:
    run = RunDir(folder)
    run.create("test")
    return run


def learn(made: Session, folder: Path, stop: Any = None) -> dict[str, Tensor]:
    return learn_blocks(made, run_in(folder), prior_of(made), stop or StopFlag(), "compress learn-mask again")


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What was recorded, without the times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in RunDir(folder).read_metrics_of(kind)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture_is_learned_and_its_weights_stay(name: str, tmp_path: Path) -> None:
    made = session(name, steps=8)
    before = {key: value.clone() for key, value in made.loaded.model.state_dict().items()}
    masks = learn(made, tmp_path)
    assert masks.keys() == {p.name for p in made.parameters}
    for p in made.parameters:
        PATTERN.index_of(masks[p.name].movedim(p.contracted_dim, -1))
    after = made.loaded.model.state_dict()
    assert same(before, after)
    found = lines(tmp_path, "block")
    assert [line["block"] for line in found] == [0, 1]
    assert any(line["improved"] for line in found)
    assert all((line["flipped"] > 0) == line["improved"] for line in found)
    assert all(line["error_after"] < line["error_before"] for line in found if line["improved"])
    assert [line["step"] for line in lines(tmp_path, "block-step")] == list(range(1, 17))
    assert not (tmp_path / "state" / "activations").exists()


@pytest.mark.parametrize("prefix", ["dense", "pruned"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_errors_are_those_of_the_dense_states_at_the_inputs_of_the_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    """Against passes of the whole model with hooks: errors of the second block, whose inputs differ with the prefix."""
    made = session(name, prefix=prefix)
    prior, model = prior_of(made), made.loaded.model
    masks = learn(made, tmp_path)
    (_, line) = lines(tmp_path, "block")
    first = {p.name for p in made.parameters if p.layer == 0}
    layer = model.model.layers[1]
    held = torch.cat(made.block_batches[-2:])

    def second_block(values: dict[str, Tensor]) -> Tensor:
        """What the second block puts out in a pass of the model with these masks."""
        caught: list[Any] = []
        handle = layer.register_forward_hook(lambda module, args, output: caught.append(output))
        with made.holding(values), torch.no_grad():
            model(input_ids=held, use_cache=False)
        handle.remove()
        return caught[0][0] if isinstance(caught[0], tuple) else caught[0]

    ones = {p.name: torch.ones_like(prior[p.name]) for p in made.parameters}
    target = second_block(ones)
    enters = {n: masks[n] for n in first} if prefix == "pruned" else {n: ones[n] for n in first}
    for mask, key in ((prior, "before"), (masks, "after")):
        if key == "after" and not line["improved"]:
            continue
        found = second_block({**{n: mask[n] for n in mask if n not in first}, **enters})
        distance, norm = (found - target).square().sum(-1), target.square().sum(-1)
        assert line[key]["token"] == pytest.approx(float((distance / norm).mean()), rel=1e-3)
        assert line[key]["mse"] == pytest.approx(float(distance.sum() / norm.sum()), rel=1e-3)


def test_logits_of_one_block_at_a_time(tmp_path: Path) -> None:
    made = session()
    layers = made.loaded.model.model.layers
    seen = []

    class Watching(StopFlag):
        @property
        def asked(self) -> bool:  # type: ignore[override]  # asked after every step
            seen.append([any(parametrize.is_parametrized(module) for module in layer.modules()) for layer in layers])
            return False

    learn(made, tmp_path, Watching())
    assert seen[0] == [True, False]
    assert seen[-1] == [False, True]
    assert all(sum(step) == 1 for step in seen)


class Killed(BaseException):
    pass


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die at the `count`-th line of the metrics, before it is written: within a block, or between two."""
    written = RunDir.append_metric
    calls = []

    def append(self: RunDir, record: dict[str, Any]) -> None:
        calls.append(record)
        if len(calls) == count:
            raise Killed
        written(self, record)

    monkeypatch.setattr(RunDir, "append_metric", append)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"prefix": "pruned"}, {"save_minutes": 1e-9}),
    ("llama", {"prefix": "dense", "cache": "disk"}, {"save_minutes": 1e-9, "noise": True, "parametrization": "patterns"}),
    ("mixtral", {"prefix": "pruned", "cache": "disk", "objective": "mse"}, {"save_minutes": 1e9}),
    (
        "llama",
        {"batch": 4},
        {"save_minutes": 1e-9, "state": "8bit", "step_in_backward": True, "clip_by": "weight"},
    ),
]


@pytest.mark.parametrize(("name", "block", "own"), CASES)
def test_killed_anywhere_and_resumed_ends_in_the_same_bits(
    name: str, block: dict[str, Any], own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = learn(session(name, own, **block), tmp_path / "whole")
    for count in (4, 6, 7, 12):  # 6 and 12 are the lines of the blocks themselves
        out = tmp_path / str(count)
        with monkeypatch.context() as patch:
            killed_at(count, patch)
            with pytest.raises(Killed):
                learn(session(name, own, **block), out)
        assert same(learn(session(name, own, **block), out), expected)
        for kind in ("block", "block-step"):
            assert lines(out, kind) == lines(tmp_path / "whole", kind)
        assert not list(out.glob("**/*.partial"))
        assert not (out / "state" / "activations").exists()


def test_a_stop_saves_and_names_the_way_on(tmp_path: Path) -> None:
    expected = learn(session(), tmp_path / "whole")
    stop = StopFlag()
    stop.asked = True  # from the first step on
    out = tmp_path / "run"
    for _ in range(8):  # all but the last step of either block
        with pytest.raises(Interrupted, match="compress learn-mask again"):
            learn(session(), out, stop)
    assert same(learn(session(), out, stop), expected)
    assert lines(out, "block-step") == lines(tmp_path / "whole", "block-step")


def test_a_finished_stage_runs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = learn(session(), tmp_path)
    monkeypatch.setattr("compress.blocks.catch_calls", None)
    assert same(learn(session(), tmp_path), expected)


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.02}, {"model": "other"}])
def test_a_foreign_checkpoint_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    learn(session(), tmp_path)
    if "model" in change:
        change = {"model": tiny_configs._build(BUILDERS["llama"]().config, seed=1)}
    with pytest.raises(MaskError, match="belongs to another run"):
        learn(session(**change), tmp_path)


def test_an_expert_without_tokens_keeps_its_prior_and_is_named(tmp_path: Path) -> None:
    model = tiny_configs.mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # equal scores: the top 2 are always the same two experts
    made = session("mixtral", model=model, min_tokens=1, steps=12)
    prior, masks = prior_of(made), learn(made, tmp_path)
    for line in lines(tmp_path, "block"):
        (counts,) = line["expert_tokens"].values()
        total = 48 * LENGTH
        assert sorted(counts) == [0, 0, total, total]
        assert len(line["starved"]) == 2 * 3
        assert all(counts[int(name.split(".")[-2])] == 0 for name in line["starved"])
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{line['block']}.mlp.experts.{name}"
            for expert, count in enumerate(counts):
                assert torch.equal(masks[key][expert], prior[key][expert]) == (count == 0 or not line["improved"])
    assert any(line["improved"] for line in lines(tmp_path, "block"))


def test_tokens_of_experts_in_whole_passes() -> None:
    made = session("qwen3_moe")
    seen = count_tokens(made.loaded.model, made.refs, made.calibration)
    found = tokens_by_expert(made.refs, seen)
    assert list(found) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for counts in found.values():
        assert len(counts) == 8
        assert sum(counts) == 2 * sum(batch.numel() for batch in made.calibration)  # every token goes to two
    assert not count_tokens(session().loaded.model, session().refs, made.calibration)


def test_weights_outside_the_blocks_are_refused(tmp_path: Path) -> None:
    made = session()
    made.refs += find_weights(made.loaded.model, ["lm_head*"])
    with pytest.raises(UsageError, match="outside the decoder blocks"):
        learn_blocks(made, run_in(tmp_path), prior_of(session()), StopFlag(), "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_block_at_a_time_on_a_gpu(tmp_path: Path) -> None:
    made = session("mixtral", device="cuda")
    masks = learn(made, tmp_path)
    assert all(parameter.device.type == "cpu" for parameter in made.loaded.model.parameters())
    assert any(line["improved"] for line in lines(tmp_path, "block"))
    assert all(mask.device.type == "cpu" for mask in masks.values())


# Kept hidden states


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_states_come_back(where: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    left_over = tmp_path / "scratch" / "old"
    left_over.parent.mkdir()
    left_over.touch()
    with scratch_folder(tmp_path / "scratch", where) as folder:
        assert (folder is None) == (where == "memory")
        assert not left_over.exists()
        kept = Activations(3, (2, 4), dtype, folder / "states" if folder else None)
        values = [torch.randn(2, 4).to(dtype) for _ in range(3)]
        for i, value in enumerate(values):
            kept[i] = value
        assert len(kept) == 3
        assert all(torch.equal(kept[i], value) and kept[i].dtype == dtype for i, value in enumerate(values))
        with pytest.raises(CompressError, match=r"\[1, 4\] came where \[2, 4\]"):
            kept[0] = torch.zeros(1, 4)
    assert not (tmp_path / "scratch").exists()


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(activations.os, "posix_fallocate", full)
    with pytest.raises(CompressError, match="No space left"), scratch_folder(tmp_path / "scratch", "disk") as folder:
        Activations(1, (2, 4), torch.float32, folder / "states")  # type: ignore[operator]
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"batch": 3}, "batch 3 is not a multiple of micro_batch 4"),
        ({"sequences": 7}, "sequences 7 is not a multiple"),
        ({"held_out": 0}, "held_out"),
        ({"steps": 0}, "steps"),
        ({"stpes": 1}, "did you mean 'steps'"),
    ],
)
def test_recipes_that_do_not_fit(block: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session(**block)


def test_a_step_in_the_backward_pass_takes_a_whole_batch_of_the_stages_there_are() -> None:
    lean = {"step_in_backward": True, "clip_by": "weight", "batch": 8, "micro_batch": 2}
    with pytest.raises(UsageError, match=r"set block\.micro_batch to the batch, 8"):
        session(learn=lean)
    session(learn=lean, batch=4)  # no step end to end is taken
    with pytest.raises(UsageError, match="set micro_batch to the batch, 8"):
        session(learn={**lean, "scope": "block-then-model"}, batch=4)


# By the command line

FAST = [
    "weights.include=['model.layers.0.*', 'model.layers.1.*']",
    "learn.steps=4",
    "learn.batch=2",
    "learn.micro_batch=2",
    "learn.precision=fp32",
    "learn.save_minutes=1e-9",
    "learn.block.steps=6",
    "learn.block.batch=2",
    "learn.block.micro_batch=2",
    "learn.block.sequences=4",
    "learn.block.held_out=2",
    "learn.block.learning_rate=0.01",
    "data.seqlen=64",
    "data.max_tokens=20000",
    "calibration.samples=8",
    "calibration.seqlen=64",
    "evaluate.texts.wikitext2.limit=2",
    "evaluate.every=2",
    "evaluate.every_limit=1",
    "evaluate.baselines=[dense]",
]


def compress(*args: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    compress("learn-mask", "quickstart", *FAST, "learn.scope=block-then-model", "--out", out)
    return out


def test_a_run_of_both_stages_leaves_its_result(both: Path) -> None:
    summary = json.loads((both / "summary.json").read_text())
    assert [row["method"] for row in summary] == ["dense", "block-wise", "learned"]
    assert [line["step"] for line in lines(both, "step")] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(both, "measure")] == [0, 2, 4]
    blocks = lines(both, "block")
    assert len(blocks) == 2
    assert any(line["improved"] for line in blocks)
    # End to end starts from the blocks' mask: it differs from the prior before the first step.
    assert lines(both, "measure")[0]["flipped"] > 0
    report = (both / "report.html").read_text()
    assert "Block by block" in report
    assert "held-out error" in report.lower()


def test_blocks_alone_end_in_the_mask_that_both_stages_start_from(both: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = json.loads(compress("learn-mask", "quickstart", *FAST, "learn.scope=block", "--out", out, "--json"))
    assert [row["method"] for row in made["summary"]] == ["dense", "learned"]
    assert made["flipped"] == pytest.approx(lines(both, "measure")[0]["flipped"])
    assert made["summary"][1]["perplexity"] == pytest.approx(
        json.loads((both / "summary.json").read_text())[1]["perplexity"], rel=1e-6
    )
    assert mask_digest(load_masks(out / "mask.safetensors").masks) == made["mask_sha256"]
    assert lines(out, "step") == []
    assert "Block by block" in (out / "report.html").read_text()


def _block_begun(text: str) -> bool:
    return text.count('"kind": "block-step"') >= 9  # in the second block


def _model_begun(text: str) -> bool:
    return '"kind": "step"' in text


@pytest.mark.parametrize("until", [_block_begun, _model_begun])
def test_a_killed_process_resumes_to_the_same_bits(until: Callable[[str], bool], both: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "compress",
        "learn-mask",
        "quickstart",
        *FAST,
        "learn.scope=block-then-model",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and until(metrics.read_text())):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    if process.returncode != 0:  # on a busy machine the signal may also come after the end
        assert process.returncode == -signal.SIGKILL, said
        assert not (out / "summary.json").exists()
        subprocess.run([*command, "--resume"], check=True, capture_output=True, env=environment)
    assert (out / "mask.safetensors").read_bytes() == (both / "mask.safetensors").read_bytes()
    for kind in ("block", "block-step", "step", "measure"):
        assert lines(out, kind) == lines(both, kind)
    assert not (out / "state" / "activations").exists()


def test_more_sequences_than_the_text_has_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"learn\.block\.sequences.*only"):
        compress("learn-mask", "quickstart", *FAST, "learn.scope=block", "learn.block.sequences=4000", "--out", out)
    assert not out.exists()
