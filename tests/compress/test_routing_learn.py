"""`compress learn-routing` on tiny models: it meets its target, resumes in the same bits, and what it saves loads again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from text_fixtures import VOCAB, prose, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import UsageError
from compress.interrupt import Interrupted
from compress.models import load_model
from compress.recipe_file import check_recipe
from compress.recipe_routing import LearnRoutingRecipe, RoutingLearnSection
from compress.routing.calibrate import meet_target
from compress.routing.decisions import make_decision
from compress.routing.gate import attach, routing_of
from compress.routing.learn import RoutingLearner
from compress.routing.mixtures import observe
from compress.routing.run import learn_routing
from compress.routing.session import prepare
from compress.routing.storage import attach_saved, frozen

K = 3
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny OLMoE with a tokenizer, and a text beside it."""
    path = tmp_path_factory.mktemp("model")
    tiny_configs.olmoe(num_experts_per_tok=K, vocab_size=VOCAB, num_experts=6).save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(prose(3000), encoding="utf-8")
    (path / "held.txt").write_text(prose(1500, seed=5), encoding="utf-8")
    return path


def raw(folder: Path, **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "recipe": "learn-routing",
        "model": {"source": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "target_activation": 0.7,
        "data": {"sources": [{"path": str(folder / "text.txt")}], "seqlen": 16},
        "calibration": {"samples": 24, "batch": 8},
        "router": {"rank": 4},
        "learn": {"steps": 12, "batch": 4, "micro_batch": 2, "precision": "fp32", "learning_rate": 0.02},
        "evaluate": {
            "texts": {"held": {"source": {"path": str(folder / "held.txt")}, "seqlen": 16}},
            "baselines": ["odp", "top-p", "top-k"],
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe[section] = {**recipe[section], name: value}
        else:
            recipe[section] = value
    return recipe


def recipe(folder: Path, **changes: Any) -> LearnRoutingRecipe:
    found = check_recipe(raw(folder, **changes), "test")
    assert isinstance(found, LearnRoutingRecipe)
    return found


def run_recipe(wanted: LearnRoutingRecipe, out: Path, resume: bool = False) -> Any:
    result = learn_routing(wanted, out, resume=resume, resume_command="again")
    assert result is not None
    return result


def test_a_run_meets_its_target_and_reports_by_layer_and_text(folder: Path, tmp_path: Path) -> None:
    result = run_recipe(recipe(folder), tmp_path / "run")
    assert abs(result.activation - 0.7) < 0.005
    assert [row["method"] for row in result.rows] == ["unpruned", "otp", "odp", "top-p", "top-2"]
    rows = {row["method"]: row for row in result.rows}
    assert abs(rows["otp"]["activation"]["held"] - 0.7) < 0.1  # other text, and little of it
    assert rows["unpruned"]["kl"]["held"] == 0
    assert rows["otp"]["kl"]["held"] > 0
    layers = rows["otp"]["experts_per_token"]["held"]
    assert list(layers) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert sum(layers.values()) / (2 * K) == pytest.approx(rows["otp"]["activation"]["held"])
    assert rows["top-2"]["activation"]["held"] == pytest.approx(2 / 3)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert f"<td>{layers['model.layers.1.mlp.experts']:.2f}</td>" in report
    assert len([json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]) == 12
    description = json.loads((tmp_path / "run" / "routing.json").read_text(encoding="utf-8"))
    assert (description["method"], description["rank"], description["mixtures"][0]["top_k"]) == ("otp", 4, K)


def test_learning_lowers_the_divergence_at_the_same_activation(folder: Path) -> None:
    """Against routers that drop at random: same start, same calibration, no steps."""

    def divergence(steps: int) -> float:
        loaded = load_model(str(folder / "model"), dtype="float32")
        batches = list(tiny_configs.tokens(batch=32, length=16, seed=1).split(8))
        mixtures, seen = observe(loaded.model, batches)
        routers: dict[str, Any] = {m.name: make_decision("otp", m, rank=4) for m in mixtures}
        for m in mixtures:
            routers[m.name].standardise(seen[m.name].hidden, seen[m.name].weights)
            with torch.no_grad():
                routers[m.name].read.normal_(0, 1, generator=torch.Generator().manual_seed(0))
        routing = attach(loaded.model, mixtures, routers, "otp")
        settings = RoutingLearnSection(steps=max(steps, 1), batch=16, micro_batch=16, precision="fp32", learning_rate=0.02)
        learner = RoutingLearner(loaded.model, routing, settings, 0.67, Accelerator(cpu=True))
        if steps:
            for _ in learner.steps(lambda step, size: tiny_configs.tokens(batch=size, length=16, seed=100 + step)):
                pass
        for gate in routing.gates:
            gate.decision = frozen(gate.decision)
        meet_target(loaded.model, routing, batches, 0.67)
        ids = tiny_configs.tokens(batch=64, length=16, seed=2)
        with torch.no_grad():
            pruned = loaded.model(ids).logits.log_softmax(-1)
            with routing.using("off"):
                full = loaded.model(ids).logits.log_softmax(-1)
        return float((full.exp() * (full - pruned)).sum(-1).mean())

    assert divergence(80) < 0.8 * divergence(0)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_resumed_run_ends_in_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    wanted = recipe(folder, evaluate={})
    whole = run_recipe(wanted, tmp_path / "whole")
    real = RoutingLearner._step

    def interrupted(self: RoutingLearner, batches: Any) -> Any:
        if self.step == at:
            self.save()
            raise Stop
        return real(self, batches)

    monkeypatch.setattr(RoutingLearner, "_step", interrupted)
    with pytest.raises(Stop):
        run_recipe(wanted, tmp_path / "cut")
    monkeypatch.undo()
    again = run_recipe(wanted, tmp_path / "cut", resume=True)
    assert again.activation == whole.activation
    for name in ("routing.safetensors", "routing.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = [
        [json.loads(x)["step"] for x in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("whole", "cut")
    ]
    assert steps[0] == steps[1] == list(range(1, 13))


def test_a_run_of_another_recipe_or_model_is_not_continued(folder: Path, tmp_path: Path) -> None:
    wanted = recipe(folder, evaluate={}, learn={"steps": 1, "batch": 2, "micro_batch": 2})
    run_recipe(wanted, tmp_path / "run")
    with pytest.raises(UsageError, match="complete"):
        run_recipe(wanted, tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="another recipe"):
        run_recipe(recipe(folder, evaluate={}), tmp_path / "run", resume=True)


def test_recomputed_blocks_give_the_same_gradients(folder: Path) -> None:
    found = []
    for recompute in (False, True):
        model = load_model(str(folder / "model"), dtype="float32").model
        ids = tiny_configs.tokens(batch=2, length=16)
        mixtures, _ = observe(model, [ids])
        routing = attach(model, mixtures, {m.name: make_decision("otp", m, rank=4) for m in mixtures}, "otp")
        settings = RoutingLearnSection(batch=2, micro_batch=2, precision="fp32", checkpoint_activations=recompute)
        learner = RoutingLearner(model, routing, settings, 0.7, Accelerator(cpu=True))
        with routing.relaxed(1.0, 3) as relaxation:
            loss, _ = learner.losses(ids, relaxation, 0.7)
            loss.backward()
        found.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
        learner.close()
        assert all(p.grad is None for p in model.parameters())
    assert len(found[0]) == len(found[1]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("odp", {}),
        ("odp", {"protect": 0.0}),
        ("odp", {"target_activation": None}),
        ("top-p", {}),
        ("top-k", {"target_activation": None, "keep": 2}),
    ],
)
def test_rules_go_through_the_same_interface(folder: Path, tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    result = run_recipe(
        recipe(folder, method=method, evaluate={}, protect=changes.pop("protect", 0.1), **changes), tmp_path / "run"
    )
    if changes.get("target_activation", 0.7) is not None:
        assert abs(result.activation - 0.7) < 0.01
    model = load_model(str(folder / "model"), dtype="float32").model
    routing = attach_saved(model, tmp_path / "run")
    assert routing is not None
    assert routing.method == method
    calibrated = json.loads((tmp_path / "run" / "routing.json").read_text())
    assert calibrated["activation"] == result.activation
    if method == "top-k":
        assert result.activation == pytest.approx(2 / 3)


def test_odp_without_a_target_takes_the_medians(folder: Path, tmp_path: Path) -> None:
    run_recipe(recipe(folder, method="odp", evaluate={}, target_activation=None, protect=0.0), tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "routing.safetensors")
    model = load_model(str(folder / "model"), dtype="float32").model
    routing = attach_saved(model, tmp_path / "run")
    assert routing is not None
    routing.detach()
    session = prepare(recipe(folder, method="odp", evaluate={}, target_activation=None))
    for name, seen in session.seen.items():
        ratios = seen.weights[:, 1:] / seen.weights[:, :1]
        assert torch.equal(tensors[f"{name}.thresholds"], ratios.median(0).values)


def test_a_price_takes_the_place_of_a_target(folder: Path, tmp_path: Path) -> None:
    shares = []
    for price in (1e-4, 3.0):
        wanted = recipe(
            folder,
            target_activation=None,
            evaluate={},
            learn={"steps": 40, "batch": 8, "micro_batch": 8, "precision": "fp32", "learning_rate": 0.05, "sparsity": price},
        )
        shares.append(run_recipe(wanted, tmp_path / str(price)).activation)
    assert shares[0] > 0.9
    assert shares[1] < 0.6


# --- saved routings


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(recipe(folder, evaluate={}), out)
    return out


def test_export_loads_with_from_pretrained_and_decides_the_same(folder: Path, finished: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["export", str(finished), "--out", str(tmp_path / "routed")])
    assert result.exit_code == 0, result.output
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", dtype=torch.float32)
    routing = routing_of(model)
    assert routing is not None
    plain: Any = load_model(str(folder / "model"), dtype="float32").model
    ids = tiny_configs.tokens()
    with torch.no_grad():
        full = plain(ids).logits
        with routing.using("off"):
            assert torch.equal(model(ids).logits, full)
        assert attach_saved(plain, finished) is not None
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert not torch.equal(model(ids).logits, full)
    ours = load_model(str(tmp_path / "routed"), dtype="float32").model
    assert routing_of(ours) is not None
    with pytest.raises(UsageError, match="has a routing already"):
        run_recipe(recipe(folder, model={"source": str(tmp_path / "routed"), "device": "cpu"}), tmp_path / "twice")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    json_out = runner.invoke(
        app, ["eval", str(tmp_path / "routed"), "--data", str(folder / "held.txt"), "--seqlen", "16", "--json"]
    )
    assert json_out.exit_code == 0, json_out.output


def test_without_the_import_transformers_runs_it_unpruned(folder: Path, finished: Path, tmp_path: Path) -> None:
    assert runner.invoke(app, ["export", str(finished), "--out", str(tmp_path / "routed")]).exit_code == 0
    code = (
        "import sys, transformers\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'routed')!r})\n"
        "assert 'compress' not in sys.modules and not hasattr(m, '_compress_routing')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_routing_of_another_model_is_refused(folder: Path, finished: Path, tmp_path: Path) -> None:
    config = {"num_experts_per_tok": K, "vocab_size": VOCAB}
    with pytest.raises(UsageError, match=r"another model: .* has 4 experts here, 6 there"):
        attach_saved(tiny_configs.olmoe(**config), finished)
    other = tiny_configs.olmoe(num_experts=6, **config)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.gate.weight.normal_(generator=torch.Generator().manual_seed(9))
    with pytest.raises(UsageError, match="routers' weights differ"):
        attach_saved(other, finished)
    with pytest.raises(UsageError, match=r"knows nothing of model\.layers\.2"):
        attach_saved(tiny_configs.olmoe(num_experts=6, num_hidden_layers=3, **config), finished)
    with pytest.raises(UsageError, match="dense model"):
        attach_saved(tiny_configs.llama(), finished)
    assert attach_saved(other, tmp_path) is None
    model = load_model(str(folder / "model"), dtype="bfloat16").model  # rounded weights are still this model's
    assert attach_saved(model, finished) is not None


def test_another_number_of_experts_a_token_is_refused(folder: Path, finished: Path) -> None:
    model = tiny_configs.olmoe(num_experts_per_tok=2, vocab_size=VOCAB, num_experts=6)
    model.load_state_dict(load_model(str(folder / "model"), dtype="float32").model.state_dict())
    attach_saved(model, finished)
    with pytest.raises(UsageError, match="runs 2 experts a token now"):
        model(tiny_configs.tokens())


def damaged(finished: Path, out: Path, what: str) -> Path:
    out.mkdir()
    description = json.loads((finished / "routing.json").read_text())
    tensors = load_file(finished / "routing.safetensors")
    if what == "version":
        description["version"] = 9
    if what == "keys":
        del description["mixtures"]
    if what == "method":
        description["method"] = "guess"
    if what != "tensors missing":
        (out / "routing.safetensors").write_bytes((finished / "routing.safetensors").read_bytes())
    if what == "other tensors":
        save_file({k: v + 1 for k, v in tensors.items()}, out / "routing.safetensors")
    if what == "rank":
        description["rank"] = 7
    (out / "routing.json").write_text(json.dumps(description))
    return out


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("version", "of version 9"),
        ("keys", "does not say mixtures"),
        ("method", "no routing method 'guess'"),
        ("tensors missing", "copy both"),
        ("other tensors", "is damaged, or of another routing"),
        ("rank", "does not hold what routing.json says"),
    ],
)
def test_damaged_files_are_refused(folder: Path, finished: Path, tmp_path: Path, what: str, message: str) -> None:
    model = load_model(str(folder / "model"), dtype="float32").model
    with pytest.raises(UsageError, match=message):
        attach_saved(model, damaged(finished, tmp_path / "bad", what))
    assert routing_of(model) is None


# --- the command


def command(folder: Path, tmp_path: Path, *arguments: str, **changes: Any) -> Any:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(raw(folder, **changes)))
    return runner.invoke(app, ["learn-routing", str(file), *arguments, "--out", str(tmp_path / "run")])


def test_the_command_prints_its_summary_as_json(folder: Path, tmp_path: Path) -> None:
    result = command(folder, tmp_path, "learn.steps=2", "evaluate.baselines=[]", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["summary"]] == ["unpruned", "otp"]
    assert abs(found["activation"] - 0.7) < 0.005


def test_a_dry_run_counts_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = command(folder, tmp_path, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    model = load_model(str(folder / "model"), dtype="float32").model
    mixtures, _ = observe(model, [tiny_configs.tokens()])
    assert plan["learned"] == sum(p.numel() for m in mixtures for p in make_decision("otp", m, rank=4).parameters())
    assert (plan["mixtures"], plan["top_k"], plan["experts"], plan["tokens"]) == (2, K, 6, 12 * 4 * 16)
    assert plan["model_bytes"] == sum(p.numel() * 4 for p in model.parameters())
    assert not (tmp_path / "run").exists()
    assert "numbers to learn" in command(folder, tmp_path, "--dry-run").stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target_activation=0.3", "at least one of its 3 experts"),
        ("target_activation=1.2", "target_activation"),
        ("model.source=asset:tiny-llama", "dense model"),
        ("method=top-k", "needs keep"),
        ("method=top-p target_activation=", "top-p needs target_activation"),
        ("method=top-k target_activation= keep=4", "keep is 4"),
        ("learn.sparsity=0.1", "either target_activation or learn.sparsity"),
        ("calibration.samples=100000", "only"),
        ("data.seqlen=1000", "64 positions"),
        ("learn.steps=-1", "learn.steps"),
        ("recipe=learn-mask", "not a valid recipe"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, override: str, message: str
) -> None:
    result = command(folder, tmp_path, *override.split(" "))
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_recipes_go_to_their_own_command(folder: Path, tmp_path: Path) -> None:
    for name, arguments in (("quickstart", "learn-routing"), ("tiny-moe-routing", "learn-mask")):
        result = runner.invoke(app, [arguments, name, "--out", str(tmp_path / "run")])
        assert isinstance(result.exception, UsageError)
        assert "run it with `compress" in str(result.exception)
    shown = runner.invoke(app, ["validate", "tiny-moe-routing"])
    assert shown.exit_code == 0
    assert "target_activation: 0.8" in shown.stdout
    schema = json.loads(runner.invoke(app, ["schema"]).stdout)
    assert {"LearnMaskRecipe", "LearnRoutingRecipe"} <= schema["$defs"].keys()


def test_an_interrupted_run_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RoutingLearner._step

    def interrupting(self: RoutingLearner, batches: Any) -> Any:
        if self.step == 3:
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batches)

    monkeypatch.setattr(RoutingLearner, "_step", interrupting)
    with pytest.raises(Interrupted, match="stopped after step 4"):
        run_recipe(recipe(folder, evaluate={}), tmp_path / "run")
    monkeypatch.undo()
    run_recipe(recipe(folder, evaluate={}), tmp_path / "run", resume=True)


def test_two_processes_learn_what_one_does(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(raw(folder, evaluate={}, learn={"steps": 4, "batch": 2, "micro_batch": 1, "precision": "fp32"})))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("one", ["-m"]),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]),
    ):
        command = [sys.executable, *launcher, "compress", "learn-routing", str(file), "--out", str(tmp_path / name), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
    one, two = (load_file(tmp_path / name / "routing.safetensors") for name in ("one", "two"))
    for name in one:
        if not name.endswith("offset"):
            assert torch.allclose(one[name].float(), two[name].float(), atol=1e-5), name
