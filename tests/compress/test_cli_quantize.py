"""`compress profile-experts`, `quantize` and `run` from the command line on the embedded mixture, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from compress.cli import app

SMALL = [
    "samples=4",
    "evaluate.texts.wikitext2.limit=2",
    "tune.steps=2",
    "tune.batch=2",
    "candidates=[1,3]",
    "quantizer.rounds=0",
]


def recipe(folder: Path) -> Path:
    """The shipped recipe with one text and less of everything."""
    from compress.recipe_file import recipe_path

    raw = yaml.safe_load(recipe_path("tiny-moe").read_text(encoding="utf-8"))
    raw["evaluate"]["texts"] = {"wikitext2": raw["evaluate"]["texts"]["wikitext2"]}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_profile_then_allocate_then_run(tmp_path: Path) -> None:
    file, out = recipe(tmp_path), tmp_path / "run"
    profiled = invoke("profile-experts", file, *SMALL, "--out", out, "--json")
    assert profiled.exit_code == 0, profiled.output
    found = json.loads(profiled.stdout)
    assert set(found["layers"]) == {"0", "1", "2", "3"}
    assert sum(found["layers"]["0"]["tokens"]) == 4 * 256 * 4  # sequences, tokens, experts a token
    assert (out / "report.html").is_file()
    allocated = invoke(
        "allocate-bits",
        "--stats",
        out / "experts.json",
        "--average-bits",
        2,
        "--mode",
        "error",
        "--json",
        "--out",
        tmp_path / "bits.json",
    )
    assert allocated.exit_code == 0, allocated.output
    ran = invoke("run", file, *SMALL, "--out", out, "--json")  # takes up the profile
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    assert 2.4 < result["average_bits"] <= 2.5
    original, quantized = result["summary"]
    assert quantized["perplexity"] == pytest.approx(original["perplexity"], rel=0.5)
    assert 0 < quantized["kl"]["wikitext2"] < 1
    assert 0 < quantized["rerouted"]["wikitext2"] < 1
    evaluated = invoke("eval", out / "model", "--data", "asset:wikitext2-test", "--seqlen", 256, "--limit", 2, "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(evaluated.stdout)["perplexity"] == pytest.approx(quantized["perplexity"], rel=0.02)
    stored = sum(f.stat().st_size for f in (out / "model").glob("*.safetensors"))
    assert abs(stored - result["bytes"]) < 0.02 * result["bytes"] + 40_000  # headers and index maps

    mine = invoke(
        "quantize",
        file,
        *SMALL,
        "allocate.average_bits=null",
        f"allocate.bits_file={tmp_path / 'bits.json'}",
        "--out",
        tmp_path / "mine",
    )
    assert mine.exit_code == 0, mine.output
    widths = json.loads((tmp_path / "mine" / "bits.json").read_text())["widths"]
    asked = json.loads((tmp_path / "bits.json").read_text())["layers"]
    assert {k: [e["down_proj"][0] for e in v] for k, v in widths.items()} == asked


def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    command = [sys.executable, "-m", "compress", "quantize", str(file), *SMALL, "tune.steps=0", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "straight")], check=True, env=environment, capture_output=True)
    killed = subprocess.Popen(
        [*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (
        not (tmp_path / "killed/profile/layer-00001.safetensors").is_file()
        and killed.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/summary.json").exists()
    subprocess.run([*command, str(tmp_path / "killed"), "--resume"], check=True, env=environment, capture_output=True)
    for layer in range(4):
        name = f"quantized/layer-{layer:05d}.safetensors"
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.source=asset:tiny-llama"], "dense model"),
        (["allocate.average_bits=0.5"], "too small"),
        (["samples=100000"], "sequences"),
        (["data.seqlen=4096"], "positions"),
        (
            ["allocate.granularity=expert", "allocate.mode=pmq", "allocate.average_bits=null", "allocate.max_bytes=9"],
            "average_bits",
        ),
        (["export.format=compressed-tensors"], "one-bit"),
        (["allocate.floor={'layers.9.*': 3}"], "matches no unit"),
        (["stream=true"], "tune.steps"),
    ],
)
def test_bad_recipes(changes: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["quantize", str(recipe(tmp_path)), *SMALL[:3], "candidates=[1,2]", *changes, "--out", str(tmp_path / "r")]
    )
    assert result.exit_code != 0
    assert message in str(result.exception), result.exception


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    file, kept = recipe(tmp_path), f"profile.folder={tmp_path / 'kept'}"
    assert invoke("profile-experts", file, *SMALL, kept, "--out", tmp_path / "a").exit_code == 0
    other = invoke("profile-experts", file, *SMALL, kept, "samples=6", "--out", tmp_path / "b")
    assert other.exit_code != 0
    assert "another calibration text" in str(other.exception)


def test_dry_run_says_sizes_and_writes_nothing(tmp_path: Path) -> None:
    result = invoke("run", "tiny-moe", "--dry-run", "--out", tmp_path / "r", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["experts"] == 64
    assert plan["expert_weights"] == 3_538_944
    assert plan["streamed_peak"] < plan["whole_peak"]
    assert not (tmp_path / "r").exists()
    assert re.search(r"64 experts in 4 layers", invoke("run", "tiny-moe", "--dry-run").stdout)


def test_a_mask_is_kept_through_quantising_and_packing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compress.assets import asset_path
    from compress.quantize.store import QuantizedStore, put_into
    from compress.weights import find_weights
    from maskllm.storage import load_masks

    mask = tmp_path / "mask.safetensors"
    assert invoke("prune", "asset:tiny-moe", "--method", "magnitude", "--out", mask).exit_code == 0
    small = ["samples=4", "evaluate.texts={}", f"mask={mask}", "quantizer.rounds=0", "export.format=none"]
    made = invoke("run", "tiny-moe-sparse", *small, "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    model = AutoModelForCausalLM.from_pretrained(asset_path("asset:tiny-moe"))
    put_into(model, QuantizedStore(tmp_path / "run/quantized"))
    masks = load_masks(mask).masks
    assert {ref.full_name for ref in find_weights(model)} == set(masks)
    for name, kept in masks.items():
        assert bool((model.get_parameter(name)[~kept] == 0).all())
    part = invoke("run", "tiny-moe-sparse", *small, "rest=[]", "--out", tmp_path / "other")
    assert part.exit_code != 0
    assert "the mask prunes" in str(part.exception)
