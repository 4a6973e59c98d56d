"""`compress export`, `inspect`, `verify`, `generate` and `eval` on quantised models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_configs
import torch
from quantized_fixtures import Case, make_case
from typer.testing import CliRunner, Result

import compress
from compress.cli import app
from compress.quantize.grid import Grid

RECIPE = "model:\n  source: {source}\n  revision: null\n  trust_remote_code: false\n"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = make_case(tmp_path_factory.mktemp("run"), "olmoe", lambda n, ref: Grid(2 + n % 3, 8, "symmetric"))
    run = made.source.parent  # with quantized/ in it
    (run / "recipe.yaml").write_text(RECIPE.format(source=made.source))
    (run / "summary.json").write_text(json.dumps([{"method": "quantized", "perplexities": {"wikitext2": 9.5}}]))
    return made


def test_packed_moe_from_a_run(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("export", case.source.parent, "--format", "packed-moe", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.stdout
    assert "every quantised matrix is what was quantised, bit for bit" in result.stdout
    assert "bits a weight in codes" in result.stdout
    card = (out / "README.md").read_text()
    assert "| quantized | 9.50 |" in card
    assert f"source: {case.source}" in card
    with torch.no_grad():
        logits = compress.load(out, device="cpu")(tiny_configs.tokens()).logits
        torch.testing.assert_close(logits, case.dense.model(tiny_configs.tokens()).logits, rtol=1e-5, atol=1e-5)

    shown = json.loads(invoke("inspect", out, "--json").stdout)
    assert shown["total"]["bytes"] == sum(row["nbytes"] for row in shown["tensors"])
    assert any(row["dtype"] == "packed 2, 3, 4 bit" for row in shown["tensors"])
    checked = invoke("verify", out)
    assert checked.exit_code == 0
    assert "holds every quantised matrix" in checked.stdout
    refused = invoke("verify", out, "--pattern", "2:4")
    assert "do" not in refused.stdout
    assert "is quantised; --pattern" in str(refused.exception)
    again = invoke("export", out, "--format", "packed-24", "--out", tmp_path / "no")
    assert "quantised checkpoint" in str(again.exception)


def test_compressed_tensors_from_a_run(case: Case, tmp_path: Path) -> None:
    run, out = case.source.parent, tmp_path / "out"
    refused = invoke("export", run, "--format", "compressed-tensors", "--out", out)
    assert "--promote" in str(refused.exception)
    result = invoke("export", run, "--format", "compressed-tensors", "--promote", "--out", out)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert json.loads((out / "compress.json").read_text())["promoted"] is True


def test_the_model_can_have_moved(case: Case, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(case.store.folder, run / "quantized")
    (run / "recipe.yaml").write_text(RECIPE.format(source=tmp_path / "gone"))
    lost = invoke("export", run, "--format", "packed-moe", "--out", tmp_path / "out")
    assert "there is no model at" in str(lost.exception)
    found = invoke("export", run, "--format", "packed-moe", "--model", case.source, "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is a run of quantize; give --format packed-moe or --format compressed-tensors"),
        (["--format", "packed-moe", "--promote"], "--promote goes with --format compressed-tensors"),
        (["--promote"], "--promote goes with --format compressed-tensors"),
        (["--format", "packed-moe", "--values", "int8"], "go with --format packed-24"),
        (["--format", "packed-moe", "--mask", "m.safetensors"], "--mask does not go with --format packed-moe"),
    ],
)
def test_options_that_do_not_go_together(case: Case, arguments: list[str], message: str, tmp_path: Path) -> None:
    result = invoke("export", case.source.parent, "--out", tmp_path / "out", *arguments)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run(case: Case, tmp_path: Path) -> None:
    result = invoke("export", case.source, "--format", "packed-moe", "--out", tmp_path / "out")
    assert "is no finished run of `compress quantize`" in str(result.exception)
