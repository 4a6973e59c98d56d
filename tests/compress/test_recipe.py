from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from compress.errors import UsageError
from compress.recipe import LearnMaskRecipe
from compress.recipe_file import apply_override, check_recipe, dump_recipe, load_recipe, recipe_path, shipped_recipes

MINIMAL = {"model": {"source": "asset:tiny-llama"}, "data": {"sources": [{"path": "asset:wikipedia"}]}}


def write(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_described(name: str) -> None:
    recipe = load_recipe(recipe_path(name))
    assert recipe.description


def test_a_dumped_recipe_reads_back_the_same() -> None:
    recipe = check_recipe(MINIMAL, "test")
    assert check_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("learn.steps=7", ("learn", "steps"), 7),
        ("learn.noise=true", ("learn", "noise"), True),
        ("learn.learning_rate=1e-3", ("learn", "learning_rate"), 1e-3),
        ("pattern=4:8", ("pattern",), "4:8"),
        ("weights.exclude=['*.k_proj.*']", ("weights", "exclude"), ["*.k_proj.*"]),
        ("learn.temperature.start=2", None, None),
        ("evaluate.texts.new.source.path=a.txt", ("evaluate", "texts", "new", "source", "path"), "a.txt"),
    ],
)
def test_overrides_are_typed_by_the_schema(tmp_path: Path, override: str, path: tuple[str, ...] | None, value: object) -> None:
    file = write(tmp_path, MINIMAL)
    if path is None:
        with pytest.raises(UsageError, match=r"learn\.temperature\.end: missing"):
            load_recipe(file, [override])
        return
    found: object = load_recipe(file, [override])
    for part in path:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_shares_of_a_step_are_divided_among_processes_first() -> None:
    """The recipe does not know how many there are: with two, this step is one micro-batch of each."""
    lean = {"step_in_backward": True, "clip_by": "weight", "batch": 4, "micro_batch": 2, "shard": "logits"}
    assert check_recipe({**MINIMAL, "learn": lean}, "test").learn.step_in_backward


def test_a_list_is_reached_by_number() -> None:
    raw = yaml.safe_load(yaml.safe_dump(MINIMAL))
    apply_override(raw, "data.sources.0.path=x.txt")
    assert raw["data"]["sources"][0]["path"] == "x.txt"
    with pytest.raises(UsageError, match="list of 1"):
        apply_override(raw, "data.sources.3.path=x.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lern": {}}, "lern: unknown key; did you mean 'learn'"),
        ({"learn": {"stpes": 3}}, "learn.stpes: unknown key; did you mean 'steps'"),
        ({"evaluate": {"texts": {"a": {"source": {"path": "x"}, "seqln": 3}}}}, "did you mean 'seqlen'"),
        ({"data": {"sources": [{"pth": "x"}]}}, "did you mean 'path'"),
        ({"learn": {"steps": -1}}, "learn.steps: "),
        ({"learn": {"steps": "many"}}, "learn.steps: "),
        ({"learn": {"batch": 3, "micro_batch": 2}}, "multiple of micro_batch"),
        ({"learn": {"distillation": 0}}, "nothing to learn from"),
        (
            {"learn": {"shard": True}},
            "learn.shard: write logits, or weights to share out the frozen weights too, in place of true",
        ),
        ({"learn": {"shard": False}}, "learn.shard: write none, in place of false"),
        ({"learn": {"shard": "weights"}}, "needs checkpoint_activations: true"),
        ({"learn": {"shard": "rows"}}, "learn.shard: input should be 'none', 'logits' or 'weights'"),
        (
            {"learn": {"step_in_backward": True, "clip_by": "weight", "batch": 4, "micro_batch": 2}},
            "set micro_batch to the batch, 4",
        ),
        ({"learn": {"step_in_backward": True, "batch": 4, "micro_batch": 4}}, "set clip_by to weight"),
        ({"learn": {"state": "int8"}}, "learn.state: "),
        ({"pattern": "4:2"}, "not an N:M pattern"),
        ({"pattern": 124}, "in quotes"),
        ({"data": {"sources": [{"path": "a", "dataset": "b"}]}}, "either path"),
        ({"data": {"sources": [{"path": "a", "span": [0.5, 0.5]}]}}, "not a part"),
        ({"model": None}, "model: "),
    ],
)
def test_faults_are_named_where_they_are(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match="is not a valid recipe") as caught:
        check_recipe({**MINIMAL, **change}, "r.yaml")
    assert message in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe({**MINIMAL, "seed": -1, "learn": {"steps": -1}}, "r.yaml")
    assert "seed" in str(caught.value)
    assert "learn.steps" in str(caught.value)


@pytest.mark.parametrize("content", ["a: [", "- 1", "just text"])
def test_what_is_no_recipe(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        load_recipe(write(tmp_path, content))


def test_unknown_names_get_the_closest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        recipe_path("quikstart")
    with pytest.raises(UsageError, match="no recipe file"):
        recipe_path(str(tmp_path / "none.yaml"))
    with pytest.raises(UsageError, match="key=value"):
        apply_override({}, "steps")


def test_the_paper_values_validate() -> None:
    paper = {
        "parametrization": "patterns", "noise": True, "temperature": {"start": 4, "end": 0.05}, "scale": {"start": 100, "end": 500},
        "learning_rate": 5e-4, "warmup": 0, "weight_decay": 0.1, "regulariser": 1e-5, "cross_entropy": 1, "distillation": 0,
    }  # fmt: skip
    assert LearnMaskRecipe.model_validate({**MINIMAL, "learn": paper}).learn.regulariser == 1e-5
