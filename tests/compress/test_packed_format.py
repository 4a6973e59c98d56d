"""The packed format as commands see it: packing, verifying and inspecting, and reading config.json with care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packed_fixtures import Case, case_of, make_case
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import UsageError
from compress.packed import PackedMatrix, from_config

RUNNER = CliRunner()
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama")


def test_a_run_directory_is_packed_with_its_recipe_and_numbers(llama: Case, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = yaml.safe_dump({"model": {"source": str(llama.source)}, "seed": 11})
    (run / "recipe.yaml").write_text(recipe)
    (run / "mask.safetensors").write_bytes(llama.mask.read_bytes())
    (run / "summary.json").write_text(json.dumps([{"method": "learned", "perplexities": {"wikitext2": 6.25}}]))
    result = RUNNER.invoke(app, ["export", str(run), "--format", "packed-24", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert recipe in card
    assert "| learned | 6.25 |" in card


def test_what_export_is_given_has_to_fit_together(llama: Case, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 1")
    source, mask, out = str(llama.source), str(llama.mask), str(tmp_path / "out")
    for arguments, message in (
        ([source, "--out", out], "give the mask with --mask"),
        ([source, "--mask", mask, "--values", "bf16", "--out", out], "go with --format packed-24"),
        ([source, "--mask", mask, "--model", source, "--out", out], "is a model itself"),
        ([mask, "--mask", mask, "--out", out], "a mask file itself"),
        ([str(tmp_path / "run"), "--out", out], "is the run finished"),
        ([str(tmp_path / "none.safetensors"), "--out", out], "there is no mask at"),
        (
            [source, "--mask", mask, "--format", "packed-24", "--include", "*", "--out", out],
            "include and exclude go with a source without",
        ),
    ):
        error = RUNNER.invoke(app, ["export", *arguments]).exception
        assert isinstance(error, UsageError), arguments
        assert message in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_packs_verifies_and_inspects(llama: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = RUNNER.invoke(
        app,
        ["export", str(llama.source), "--mask", str(llama.mask), "--format", "packed-24", "--values", "bf16", "--out", str(out)],
    )
    assert run.exit_code == 0, run.output
    assert "9.00 bits a weight" in run.stdout
    shown = json.loads(RUNNER.invoke(app, ["inspect", str(out), "--json"]).stdout)["tensors"]
    row = next(row for row in shown if row["name"] == UP)
    assert (row["shape"], row["dtype"], row["bits"], row["pattern"]) == ([48, 32], "packed bf16", 9.0, "2:4")
    assert any(row["name"] == "model.norm.weight" for row in shown)
    verified = RUNNER.invoke(app, ["verify", str(out), "--json"])
    assert json.loads(verified.stdout)["ok"]
    against = RUNNER.invoke(app, ["verify", str(out), "--mask", str(llama.mask), "--original", str(llama.source), "--json"])
    assert json.loads(against.stdout)["ok"], against.output


def test_verify_finds_a_wrong_value_a_wrong_code_and_another_mask(llama: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llama.pack(out)
    tensors, base = load_file(out / "model.safetensors"), UP.removesuffix("weight")
    other = case_of(llama.source, tmp_path / "other.safetensors", seed=2)

    def verify(*options: str) -> dict[str, Any]:
        result = RUNNER.invoke(app, ["verify", str(out), "--json", *options])
        facts = json.loads(result.stdout)
        assert not facts["ok"]
        return {row["name"]: row for report in facts["reports"] for row in report["failed"]}

    assert len(verify("--mask", str(other.mask))) == len(llama.masks.masks)
    against = ["--mask", str(llama.mask), "--original", str(llama.source)]
    save_file({**tensors, base + "values": tensors[base + "values"] * 2}, out / "model.safetensors", {"format": "pt"})
    assert list(verify(*against)) == [UP]
    norm = "model.norm.weight"
    save_file({**tensors, norm: tensors[norm] * 2}, out / "model.safetensors", {"format": "pt"})
    assert list(verify(*against)) == [norm]
    save_file({**tensors, base + "meta": tensors[base + "meta"] * 0}, out / "model.safetensors", {"format": "pt"})
    assert "not legal" in verify()[UP]["note"]


def test_the_description_in_config_json_is_read_with_care() -> None:
    good = {
        "quant_method": "compress-packed-24",
        "version": 1,
        "pattern": "2:4",
        "values": "bf16",
        "activations": "float",
        "matrices": {"a.weight": {"shape": [4, 8], "contracted_dim": -1}},
    }
    assert from_config(good, "here") == [PackedMatrix("a.weight", (4, 8), -1, "bf16")]
    for change, message in (
        ({"version": 3}, "version 3; this release reads versions up to 2"),
        ({"quant_method": "gptq"}, "quantised by 'gptq'"),
        ({"pattern": "4:8"}, "pattern '4:8'"),
        ({"values": "int4"}, "values 'int4'"),
        ({"activations": "int8"}, "activations 'int8' do not go with bf16"),
        ({"matrices": {}}, "lists no matrices"),
        (
            {"matrices": {"a.weight": {"shape": [4, 6], "contracted_dim": -1}}},
            r"a.weight of shape \[4, 6\] cannot be packed along -1",
        ),
        ({"matrices": {"a.weight": {"contracted_dim": -1}}}, "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            from_config({**good, **change}, "here")


def test_tensor_names_shapes_and_bytes() -> None:
    linear = PackedMatrix("model.layers.0.q.weight", (6, 12), -1, "int8")
    assert linear.prefix == "model.layers.0.q."
    assert linear.tensors == {
        "values": (torch.int8, (6, 6)),
        "meta": (torch.uint8, (6, 2)),
        "scale": (torch.float32, (6,)),
    }
    assert linear.nbytes == 36 + 12 + 24
    experts = PackedMatrix("model.layers.0.experts.down_proj", (3, 16, 8), -2, "bf16")
    assert experts.prefix == "model.layers.0.experts.down_proj_"
    assert experts.matrix_shape == (3, 8, 16)
    assert experts.tensors == {"values": (torch.bfloat16, (3, 8, 8)), "meta": (torch.uint8, (3, 8, 2))}
