"""`compress generate`: the text, its speed, and that a packed model says the same as the masked one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
from packed_fixtures import P24
from test_models import save
from text_fixtures import tiny_tokenizer
from typer.testing import CliRunner, Result

from compress.cli import app
from compress.errors import UsageError
from compress.export.dense import export_dense
from compress.export.packed24 import export_packed
from compress.export.source import open_source
from compress.generate import generate
from compress.models import LoadedModel, load_model
from compress.prune import prune_one_shot
from compress.weights import by_parameter, find_weights
from maskllm.storage import load_masks, save_masks

RUNNER = CliRunner()
PROMPT = "The history of the"


def invoke(*args: object) -> Result:
    result = RUNNER.invoke(app, ["generate", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def as_json(*args: object) -> dict[str, Any]:
    return json.loads(invoke(*args, "--json").stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded Llama with a magnitude mask: dense, and packed in every type."""
    folder = tmp_path_factory.mktemp("generate")
    loaded = load_model("asset:tiny-llama", tokenizer=False)
    refs = find_weights(loaded.model)
    masks = prune_one_shot(loaded.model, refs, P24, "magnitude", []).masks
    dims = {parameter.name: parameter.contracted_dim for parameter in by_parameter(refs)}
    save_masks(folder / "mask.safetensors", masks, P24, dims)
    export_dense(loaded, masks, folder / "dense", pattern=P24, contracted=dims)
    for values in ("fp32", "bf16", "int8"):
        export_packed(
            open_source("asset:tiny-llama"), folder / values, masks=load_masks(folder / "mask.safetensors"), values=values
        )
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_a_packed_model_says_what_the_masked_one_says(folders: dict[str, Path], values: str) -> None:
    options = ["--prompt", PROMPT, "--max-new-tokens", 40, "--dtype", "float32"]
    dense, packed = as_json(folders["dense"], *options), as_json(folders[values], *options)
    assert dense["new_tokens"] == 40
    assert packed["text"] == dense["text"]
    assert len(set(dense["text"].split())) > 2


def test_the_text_comes_to_stdout_and_the_speed_to_stderr(folders: dict[str, Path]) -> None:
    options = [folders["bf16"], "--prompt", PROMPT, "--max-new-tokens", 12, "--dtype", "float32"]
    shown, facts = invoke(*options), as_json(*options)
    assert shown.stdout == facts["text"] + "\n"
    assert "prefill 4 tokens at" in shown.stderr or f"prefill {facts['prompt_tokens']} tokens at" in shown.stderr
    assert "decode 11 tokens at" in shown.stderr
    assert (facts["new_tokens"], facts["stopped"], facts["dtype"]) == (12, "length", "float32")
    assert facts["decode_tokens_per_second"] == pytest.approx(11 / facts["decode_seconds"])
    assert facts["prefill_tokens_per_second"] == pytest.approx(facts["prompt_tokens"] / facts["prefill_seconds"])


def test_dense_models_of_any_source_and_int8_work(folders: dict[str, Path]) -> None:
    for source in ("asset:tiny-llama", folders["int8"]):
        assert as_json(source, "--prompt", PROMPT, "-n", 3)["new_tokens"] == 3
    assert as_json("asset:tiny-moe", "--prompt", PROMPT, "-n", 1)["decode_tokens_per_second"] is None


def test_a_temperature_draws_from_the_whole_distribution_by_the_seed(folders: dict[str, Path]) -> None:
    options = [folders["dense"], "--prompt", PROMPT, "-n", 16, "--temperature", 1.0]
    first, same, other = (as_json(*options, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert first == same != other


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save(tmp_path_factory.mktemp("tiny") / "model", tiny_configs.llama())))


def test_greedy_is_the_most_likely_token_whatever_the_generation_config_says(tiny: LoadedModel) -> None:
    tiny.model.generation_config.repetition_penalty = 5.0
    tiny.model.generation_config.do_sample = True
    tiny.model.generation_config.temperature = 9.0
    ids = tiny.tokenizer("w5 w9", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, tiny.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    made = generate(tiny, "w5 w9", max_new_tokens=10)
    new = ids[0, 2:].tolist()
    new = new[: new.index(2) + 1] if 2 in new else new
    assert made.new_tokens == len(new)
    assert made.text.split() == tiny.tokenizer.decode(new, skip_special_tokens=True).split()


def test_it_stops_at_the_end_token_and_at_the_last_position(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    long = generate(tiny, "w5 w9", max_new_tokens=500)
    assert long.stopped == "end" or long.prompt_tokens + long.new_tokens == 64
    first = tiny.tokenizer(generate(tiny, "w5 w9", max_new_tokens=1).text)["input_ids"]
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", first)
    made = generate(tiny, "w5 w9", max_new_tokens=20)
    assert (made.new_tokens, made.stopped) == (1, "end")
    with pytest.raises(UsageError, match="64 tokens, and the model has 64 positions"):
        generate(tiny, "w5 " * 64)


def test_an_empty_prompt_starts_with_the_first_token_of_texts(tiny: LoadedModel) -> None:
    assert generate(tiny, "", max_new_tokens=2).prompt_tokens == 1
    with pytest.raises(UsageError, match="the prompt is empty"):
        generate(LoadedModel(tiny.model, tiny_tokenizer(bos=False), "tiny"), "")


def test_eval_and_its_reference_take_packed_folders(folders: dict[str, Path]) -> None:
    options = ["--seqlen", "64", "--limit", "2", "--dtype", "float32", "--json"]
    result = RUNNER.invoke(app, ["eval", str(folders["fp32"]), "--reference", str(folders["dense"]), *options])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["kl"] == pytest.approx(0, abs=1e-6)
    assert facts["top1_agreement"] == 1.0


def test_without_stopping_no_end_ends_the_text(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(folders["bf16"]), dtype="float32")
    config = loaded.model.generation_config
    text = generate(loaded, PROMPT, max_new_tokens=30, stop=False)
    ends = loaded.tokenizer(text.text)["input_ids"][9:10]
    monkeypatch.setattr(config, "eos_token_id", ends)
    assert generate(loaded, PROMPT, max_new_tokens=30, stop=True).stopped == "end"
    again = generate(loaded, PROMPT, max_new_tokens=30, stop=False)
    assert (again.text, again.new_tokens, again.stopped) == (text.text, 30, "length")
    assert config.eos_token_id == ends
