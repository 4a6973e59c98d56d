"""Several domain masks from one recipe."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.domains import domain_recipes
from compress.errors import UsageError
from compress.recipe_file import check_recipe, load_recipe, recipe_path

TEXT = {"seqlen": 64, "limit": 2, "bos": "none"}
RAW = {
    "recipe": "learn-mask",
    "model": {"source": "asset:tiny-llama", "dtype": "float32"},
    "weights": {"include": ["*layers.0.mlp*"]},
    "data": {"sources": [{"path": "asset:wikipedia"}], "seqlen": 32},
    "calibration": {"samples": 2},
    "prior": {"method": "magnitude"},
    "learn": {"steps": 2, "batch": 2, "learning_rate": 0.03, "warmup": 0},
    "domains": {
        "code": {
            "sources": [{"path": "asset:python", "span": [0, 0.1]}],
            "text": {"source": {"path": "asset:python", "span": [0.9, 1]}, **TEXT},
        },
        "medical": {
            "sources": [{"path": "asset:pubmed", "span": [0, 0.1]}],
            "text": {"source": {"path": "asset:pubmed", "span": [0.9, 1]}, **TEXT},
        },
    },
    "evaluate": {"texts": {"wikipedia": {"source": {"path": "asset:wikipedia", "span": [0.9, 1]}, **TEXT}}},
}


def write(path, raw):
    path.write_text(json.dumps(raw))  # JSON is YAML
    return str(path)


def test_every_domain_learns_from_its_own_text_and_is_measured_on_all():
    recipes = domain_recipes(check_recipe(RAW, "test"))
    assert list(recipes) == ["code", "medical"]
    medical = recipes["medical"]
    assert medical.data.sources[0].path == "asset:pubmed"
    assert list(medical.evaluate.texts) == ["medical", "code", "wikipedia"]
    assert medical.evaluate.baselines == ["dense", "prior"]
    assert not medical.domains


def test_a_domain_may_not_share_its_name_with_a_text():
    raw = {**RAW, "domains": {"wikipedia": RAW["domains"]["code"]}}
    with pytest.raises(UsageError, match="share the name 'wikipedia'"):
        domain_recipes(check_recipe(raw, "test"))


def test_the_shipped_recipe_is_valid():
    recipe = load_recipe(recipe_path("smollm2-domains"))
    assert list(domain_recipes(recipe)) == ["code", "medical"]


def test_from_a_general_mask_to_a_table_of_masks_and_domains(tmp_path):
    runner = CliRunner()
    general = tmp_path / "general"
    raw = {**RAW, "domains": {}}
    first = runner.invoke(app, ["learn-mask", write(tmp_path / "a.yaml", raw), "--out", str(general)])
    assert first.exit_code == 0, first.output
    recipe = write(tmp_path / "b.yaml", {**RAW, "prior": {"mask": str(general)}})
    out = tmp_path / "domains"
    result = runner.invoke(app, ["learn-mask", recipe, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["summary"]
    assert [row["method"] for row in rows] == ["dense", "prior", "code mask", "medical mask"]
    assert all(list(row["perplexities"]) == ["code", "medical", "wikipedia"] for row in rows)
    assert (out / "code" / "mask.safetensors").exists()
    # What is complete is not learned again, and not overwritten either.
    again = runner.invoke(app, ["learn-mask", recipe, "--out", str(out), "--resume", "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["summary"] == rows
    refused = runner.invoke(app, ["learn-mask", recipe, "--out", str(out)])
    assert isinstance(refused.exception, UsageError)
    assert "--resume" in str(refused.exception)
    other = runner.invoke(app, ["learn-mask", recipe, "seed=5", "--out", str(out), "--resume"])
    assert "another recipe" in str(other.exception)
