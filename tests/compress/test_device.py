"""What a machine computes in: its types, and recipes that leave them to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_fixtures import make_case

from compress import console, device
from compress.device import dtype_on, fastest_dtype, multiplies, tell_slow
from compress.errors import UsageError
from compress.learn import learn_mask
from compress.models import load_model
from compress.recipe import LearnMaskRecipe
from compress.recipe_file import load_recipe, shipped_recipes
from compress.recipe_quantize import QuantizeRecipe
from compress.recipe_routing import LearnRoutingRecipe
from compress.settings import learn_settings, settled
from compress.stream import open_streamed

CPU = torch.device("cpu")


@pytest.fixture(params=["", "avx512_bf16", "amx_bf16", "bf16"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A processor with one of the instruction sets for bfloat16, or none."""
    machine_with(monkeypatch, request.param)
    return str(request.param)


def machine_with(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = {"avx2": True, "avx512_bf16": False, "amx_bf16": False, **dict.fromkeys(filter(None, names), True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


def mask_recipe(**changes: Any) -> LearnMaskRecipe:
    return LearnMaskRecipe.model_validate(
        {
            "model": {"source": "asset:tiny-llama", "dtype": "fastest", "device": "cpu"},
            "data": {"sources": [{"path": "asset:wikipedia"}], "seqlen": 32, "max_tokens": 4000},
            "calibration": {"samples": 2},
            "prior": {"method": "magnitude"},
            "learn": {"steps": 1, "batch": 1, "micro_batch": 1},
            **changes,
        }
    )


def test_types_follow_the_instructions(instructions: str) -> None:
    native = bool(instructions)
    assert multiplies(torch.bfloat16, CPU) is native
    assert multiplies(torch.float32, CPU)
    assert not multiplies(torch.float16, CPU)
    assert fastest_dtype(CPU) == ("bfloat16" if native else "float32")
    assert dtype_on(CPU, "fastest") == (torch.bfloat16 if native else torch.float32)
    assert dtype_on(CPU, "auto") is None
    assert dtype_on(CPU, "float16") == torch.float16
    with pytest.raises(UsageError, match="one of auto, fastest"):
        dtype_on(CPU, "half")


def test_a_torch_that_cannot_tell_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fastest_dtype(CPU) == "float32"


def test_models_load_in_the_fastest_type(instructions: str) -> None:
    wanted = torch.bfloat16 if instructions else torch.float32
    assert load_model("asset:tiny-llama", dtype="fastest", tokenizer=False).model.dtype == wanted
    assert open_streamed("asset:tiny-llama", stream=True, dtype="fastest").model.dtype == wanted


def test_recipes_are_settled_by_the_device(instructions: str) -> None:
    found = settled(mask_recipe())
    assert found.model.dtype == ("bfloat16" if instructions else "float32")
    assert found.learn.precision == ("bf16" if instructions else "fp32")
    assert learn_settings(found.learn, 0).bf16 is bool(instructions)
    assert settled(found) == found


def test_what_a_recipe_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch)
    said = mask_recipe(model={"source": "asset:tiny-llama", "dtype": "bfloat16", "device": "cpu"}, learn={"precision": "bf16"})
    assert settled(said) == said


def test_every_shipped_recipe_can_be_settled() -> None:
    kinds = set()
    for path in shipped_recipes().values():
        visits = "device: cuda" in path.read_text(encoding="utf-8")
        recipe = load_recipe(path, ["model.device=cpu", *(["learn.block.device=cpu"] if visits else [])])
        found = settled(recipe)
        kinds.add(type(found))
        assert found.model.dtype != "fastest"
        assert isinstance(found, QuantizeRecipe) or found.learn.precision != "auto"
    assert kinds == {LearnMaskRecipe, LearnRoutingRecipe, QuantizeRecipe}


def test_an_unsettled_section_is_refused() -> None:
    with pytest.raises(ValueError, match="settled"):
        learn_settings(mask_recipe().learn, 0)


def test_blocks_that_visit_another_device_decide_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch)
    visiting = {"scope": "block", "block": {"device": "meta"}}
    assert settled(mask_recipe(learn=visiting)).learn.precision == "bf16"
    assert settled(mask_recipe(learn={**visiting, "scope": "block-then-model"})).learn.precision == "fp32"


def test_a_run_records_what_it_computed_in_and_keeps_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch)
    learn_mask(mask_recipe(), tmp_path / "run", resume=False, resume_command="")
    recorded = (tmp_path / "run/recipe.yaml").read_text()
    assert "dtype: float32" in recorded
    assert "precision: fp32" in recorded
    (tmp_path / "run/summary.json").unlink()  # as if it had not ended
    machine_with(monkeypatch, "amx_bf16")
    with pytest.raises(UsageError, match=r"differs here: dtype: bfloat16; precision: bf16"):
        learn_mask(mask_recipe(), tmp_path / "run", resume=True, resume_command="")


def test_a_slow_type_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch)
    monkeypatch.setattr(device, "_told", set())
    with console.log.capture() as said:
        tell_slow(torch.nn.Linear(2, 2))
    assert said.get() == ""
    with console.log.capture() as said:
        tell_slow(torch.nn.Linear(2, 2).bfloat16())
        tell_slow(torch.nn.Linear(2, 2).bfloat16())
    assert said.get().count("no instructions") == 1
    monkeypatch.setattr(device, "_told", set())
    with console.log.capture() as said:
        tell_slow(torch.nn.Linear(2, 2), torch.bfloat16)
    assert said.get().count("no instructions") == 1, "products of another type than the weights"
    machine_with(monkeypatch, "bf16")
    monkeypatch.setattr(device, "_told", set())
    with console.log.capture() as said:
        tell_slow(torch.nn.Linear(2, 2).bfloat16())
    assert said.get() == ""


def test_packed_models_are_not_called_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their products are not torch's; that of a dense head is, and in a text that is only read it sees many tokens."""
    machine_with(monkeypatch)
    case = make_case(tmp_path, "llama")

    def told(folder: Path, head: bool) -> bool:
        monkeypatch.setattr(device, "_told", set())
        with console.log.capture() as said:
            tell_slow(load_model(str(folder), dtype="bfloat16", tokenizer=False).model, head=head)
        return "no instructions" in said.get()

    assert told(case.source, head=False)
    case.pack(tmp_path / "dense-head", values="bf16")
    assert told(tmp_path / "dense-head", head=True)
    assert not told(tmp_path / "dense-head", head=False)
    case.pack(tmp_path / "int8-head", values="bf16", embedding="int8")
    assert not told(tmp_path / "int8-head", head=True)
