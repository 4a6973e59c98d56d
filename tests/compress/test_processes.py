"""Two processes learn the masks that one learns, whatever they share out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import shared_run
import torch

from compress.errors import UsageError
from compress.models import load_model
from compress.processes import Processes
from compress.recipe_file import check_recipe
from compress.weights import find_weights

# Steps so long that masks flip widely: what a process sees, and how gradients are averaged, decides the result.
RAW = {
    "recipe": "learn-mask",
    "model": {"source": "asset:tiny-llama", "dtype": "float32", "device": "cpu"},
    "weights": {"include": ["*layers.[01].*"]},
    "data": {"sources": [{"path": "asset:wikitext2-valid"}], "seqlen": 32},
    "prior": {"method": "magnitude"},
    "learn": {"steps": 3, "batch": 4, "micro_batch": 1, "precision": "fp32", "learning_rate": 0.02, "warmup": 0, "noise": True},
    "evaluate": {"baselines": []},
}
ONE = [sys.executable, "-m"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


def run(launcher, tmp_path, name, *overrides):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RAW))
    command = [*launcher, "compress", "learn-mask", str(recipe), *overrides, "--out", str(tmp_path / name), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_give_the_same_masks_as_one(tmp_path):
    one, two = run(ONE, tmp_path, "one"), run(TWO, tmp_path, "two")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert json.loads(one.stdout)["flipped"] > 0.1
    json.loads(two.stdout)  # one object: the second process prints nothing
    # Not the same bits in general: a process sums its own micro-batches first. Of four addends in float32, few groups can tell.
    compare = subprocess.run(
        [*ONE, "compress", "masks", "diff", str(tmp_path / "one"), str(tmp_path / "two"), "--json"],
        capture_output=True,
        text=True,
    )
    assert json.loads(compare.stdout)["share"] < 1e-3


def test_with_one_micro_batch_a_process_the_bits_are_the_same(tmp_path):
    two = run(TWO, tmp_path, "two", "learn.batch=2")
    one = run(ONE, tmp_path, "one", "learn.batch=2")
    assert two.returncode == 0, two.stderr
    assert json.loads(one.stdout)["mask_sha256"] == json.loads(two.stdout)["mask_sha256"]


@pytest.mark.parametrize("shard", ["logits", "weights"])
def test_what_is_shared_out_gives_the_same_masks(tmp_path, shard):
    """With what amid learning reads them: measurements and checkpoints. One process goes on from the checkpoint of two."""
    # Not clipped: the gradient's norm is added up in another order, and after one step of Adam, of equal size for all, many scores tie.
    more = ["learn.clip=0", "learn.batch=2", f"learn.shard={shard}", "learn.save_minutes=1.0e-9", "evaluate.every=1"]
    more += ["learn.checkpoint_activations=true", "evaluate.baselines=[dense,prior]"]
    texts = ["evaluate.texts={t: {source: {path: 'asset:wikitext2-test'}, seqlen: 32, limit: 4}}"]
    one, two = run(ONE, tmp_path, "one", *more, *texts), run(TWO, tmp_path, "two", *more, *texts)
    assert two.returncode == 0, two.stderr
    assert json.loads(one.stdout) | {"run": ""} == json.loads(two.stdout) | {"run": ""}
    measured = [
        [line for line in map(json.loads, (tmp_path / n / "metrics.jsonl").open()) if line["kind"] == "measure"]
        for n in ("one", "two")
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 4
    assert [row["method"] for row in json.loads(two.stdout)["summary"]] == ["dense", "prior", "learned"]
    for name in ("mask.safetensors", "summary.json"):
        (tmp_path / "two" / name).unlink()
    shutil.rmtree(tmp_path / "two" / "state" / "step-00000003")
    again = run(ONE, tmp_path, "two", *more, *texts, "--resume")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["mask_sha256"] == json.loads(one.stdout)["mask_sha256"]


def test_each_of_two_processes_holds_half_of_the_masked_weights(tmp_path):
    recipe = {**RAW, "learn": {**RAW["learn"], "steps": 1, "shard": "weights", "checkpoint_activations": True}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = [*TWO[:-1], shared_run.__file__, str(tmp_path / "recipe.json"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = load_model("asset:tiny-llama", dtype="float32").model
    masked = sum(ref.view().numel() for ref in find_weights(model, RAW["weights"]["include"]))
    rest = sum(p.numel() for p in model.parameters()) - masked  # embeddings, norms, the head and the blocks that are not masked
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"masked": 4 * masked // 2, "others": 4 * rest}


def test_what_needs_one_process_says_so(tmp_path):
    result = run(TWO, tmp_path, "block", "learn.scope=block")
    assert result.returncode != 0
    assert "learn.scope: block runs in one process" in result.stderr


@pytest.mark.parametrize("version", ["1", "2"])
def test_an_fsdp_launch_is_told_what_to_write(tmp_path, version):
    """Before accelerate wraps anything, and before transformers loads a model for FSDP to fill."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RAW))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", version, "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "compress", "learn-mask", str(recipe), "--out", str(tmp_path / "run")]
    # As where accelerate was never configured: its file of defaults would change the launch.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode != 0
    assert "FSDP would wrap the model" in result.stderr, result.stderr[-2000:]
    assert "learn.shard: weights" in result.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_is_the_first_and_agrees_with_itself():
    processes = Processes.join(check_recipe(RAW, "test"))
    assert processes.first
    assert processes.any(True)
    assert not processes.any(False)


def test_shared_logits_refuse_experts_that_run_only_where_a_token_reaches_them():
    sharded = Processes(Processes.join(check_recipe(RAW, "test")).accelerator, "logits")
    expert = SimpleNamespace(expert=0, parameter=torch.zeros(4, 4))
    fused = SimpleNamespace(expert=0, parameter=torch.zeros(2, 4, 4))
    sharded.expect_idle([fused, SimpleNamespace(expert=None, parameter=torch.zeros(4, 4))])
    with pytest.raises(UsageError, match=r"learn\.shard"):
        sharded.expect_idle([expert])
