"""Dense exports of every weight layout: what is on disk is mask times original, bit for bit, under the original's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_configs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import UsageError, VerificationError
from compress.export.dense import export_dense
from compress.models import LoadedModel, load_model
from compress.prune import prune_one_shot
from compress.verify import verify_checkpoint
from compress.weights import by_parameter, find_weights
from maskllm.patterns import Pattern

P24 = Pattern(2, 4)
ARCHITECTURES = ["llama", "qwen3", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"]


def make(name: str, folder: Path) -> tuple[LoadedModel, dict[str, torch.Tensor], dict[str, int]]:
    getattr(tiny_configs, name)().save_pretrained(folder)
    loaded = load_model(str(folder), tokenizer=False)
    refs = find_weights(loaded.model)
    masks = prune_one_shot(loaded.model, refs, P24, "magnitude", []).masks
    return loaded, masks, {p.name: p.contracted_dim for p in by_parameter(refs)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_is_mask_times_original(name: str, tmp_path: Path) -> None:
    loaded, masks, contracted = make(name, tmp_path / "source")
    out = tmp_path / "out"
    export_dense(loaded, masks, out, pattern=P24, contracted=contracted)
    assert (out / "config.json").read_bytes() == (tmp_path / "source" / "config.json").read_bytes()
    with safe_open(tmp_path / "source" / "model.safetensors", "pt") as a, safe_open(out / "model.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
    plain = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for key, value in loaded.model.state_dict().items():
        expected = torch.where(masks[key], value, torch.zeros_like(value)) if key in masks else value
        assert torch.equal(plain[key], expected), key
        assert not bool((torch.signbit(plain[key]) & (plain[key] == 0) & (value != 0)).any()), key  # +0.0, not -0.0
    assert verify_checkpoint(out).ok
    assert json.loads((out / "compress.json").read_text())["pattern"] == "2:4"


def test_a_group_with_too_many_weights_is_found(tmp_path: Path) -> None:
    loaded, masks, contracted = make("llama", tmp_path / "source")
    out = tmp_path / "out"
    export_dense(loaded, masks, out, pattern=P24, contracted=contracted)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4:8] = 1.0
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = verify_checkpoint(out)
    assert [row.bad_groups for row in report.rows if not row.ok] == [1]
    with pytest.raises(VerificationError, match="up_proj"):
        report.raise_if_bad()


def test_nothing_in_the_way_is_replaced(tmp_path: Path) -> None:
    loaded, masks, contracted = make("llama", tmp_path / "source")
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            export_dense(loaded, masks, other, pattern=P24, contracted=contracted, overwrite=overwrite)
        with pytest.raises(UsageError):
            export_dense(loaded, masks, tmp_path / "source", pattern=P24, contracted=contracted, overwrite=overwrite)
    assert (other / "chapter.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "thesis"]


def test_updated_weights_replace_the_kept_ones(tmp_path: Path) -> None:
    loaded, _, contracted = make("llama", tmp_path / "source")
    pruned = prune_one_shot(loaded.model, find_weights(loaded.model), P24, "sparsegpt", [torch.arange(1, 33).view(1, 32)])
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    export_dense(loaded, pruned.masks, tmp_path / "out", pattern=P24, contracted=contracted, weights=pruned.weights)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for key in pruned.masks:
        assert torch.equal(plain[key], pruned.weights[key])
        assert not torch.equal(plain[key], before[key] * pruned.masks[key])
    assert all(torch.equal(v, before[k]) for k, v in loaded.model.state_dict().items())
