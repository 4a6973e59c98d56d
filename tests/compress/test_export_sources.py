"""Dense exports from every kind of source and of every value, kills on the way, the card, and the mask alone as a file."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_configs
import torch
from packed_fixtures import P24, Case, case_of, make_case, tensors_of
from safetensors.torch import load_file, save_file
from test_models import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import UsageError, VerificationError
from compress.export import dense, torchao24
from compress.export.dense import export_dense
from compress.export.mask import export_mask
from compress.models import load_model
from compress.verify import verify_checkpoint
from maskllm.patterns import Pattern
from maskllm.storage import load_masks, load_npz, mask_digest

UP = "model.layers.1.mlp.up_proj.weight"
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 1e-45)


def export(case: Case, out: Path, **options: Any) -> None:
    export_dense(
        load_model(str(case.source), tokenizer=case.source.suffix == ".gguf"),
        dict(case.masks.masks),
        out,
        pattern=P24,
        contracted=case.masks.contracted,
        **options,
    )


def test_from_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "model.gguf", tiny_configs.llama())
    case = case_of(tmp_path / "gguf" / "model.gguf", tmp_path / "mask.safetensors")
    export(case, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(plain[name], case.meant(name)) for name in case.masks.masks)
    rest = {name: value for name, value in case.loaded.model.state_dict().items() if name not in case.masks.masks}
    assert all(torch.equal(plain[name], value) for name, value in rest.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1")["input_ids"] == [2]
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert verify_checkpoint(tmp_path / "out").ok


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_from_shards_to_the_same_shards(architecture: str, tmp_path: Path) -> None:
    tiny_configs.BUILDERS[architecture]().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    case = case_of(tmp_path / "source", tmp_path / "mask.safetensors")
    export(case, tmp_path / "out")
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (tmp_path / "source" / index).read_bytes()
    files = sorted(file.name for file in (tmp_path / "source").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    for file in files:
        before, after = load_file(tmp_path / "source" / file), load_file(tmp_path / "out" / file)
        assert {name: (t.shape, t.dtype) for name, t in before.items()} == {name: (t.shape, t.dtype) for name, t in after.items()}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(plain[name], case.meant(name)) for name in case.masks.masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values_are_kept_to_the_bit_or_become_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    """A NaN, an infinity or a -0.0 that the mask keeps stays as it is; one that it drops is +0.0, not NaN."""
    tiny_configs.llama().to(dtype).save_pretrained(tmp_path / "source")
    case = case_of(tmp_path / "source", tmp_path / "mask.safetensors")
    tensors = load_file(case.source / "model.safetensors")
    mask = case.masks.masks[UP]
    for places in (mask.nonzero(), (~mask).nonzero()):
        for (row, column), value in zip(places[: len(SPECIAL)].tolist(), SPECIAL, strict=True):
            tensors[UP][row, column] = value
    tensors["model.norm.weight"][:5] = torch.tensor(SPECIAL, dtype=dtype)
    save_file(tensors, case.source / "model.safetensors", {"format": "pt"})
    export(case, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(written["model.norm.weight"].view(bits), tensors["model.norm.weight"].view(bits))
    assert torch.equal(written[UP].view(bits)[mask], tensors[UP].view(bits)[mask])
    assert not written[UP].view(bits)[~mask].any()
    assert int(written[UP].isnan().sum()) == 1


def killed_on_the_way(case: Case, out: Path, where: str) -> int:
    """Overwrite `out` in a process that is killed at some point; how the process ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:

        def die(*args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "rename":  # between the two: the old export is aside, the new one not yet in its place
            rename = Path.rename
            Path.rename = lambda self, target: die() if self.name.endswith(".partial") else rename(self, target)  # type: ignore
        else:
            setattr(dense, where, die)
        export(case, out, overwrite=True)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed on its way")
@pytest.mark.parametrize("where", ["write_safetensors", "verify_against", "rename"])
def test_an_overwrite_that_is_killed_leaves_the_old_export_whole(where: str, tmp_path: Path) -> None:
    case, out = make_case(tmp_path / "model", "llama"), tmp_path / "out"
    export(case, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other = case_of(case.source, tmp_path / "other.safetensors", seed=2)
    assert killed_on_the_way(other, out, where) == signal.SIGKILL
    if where != "rename":
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    # Whoever looks next finds the old export, and a later overwrite goes through and leaves nothing beside it.
    with pytest.raises(UsageError, match="not empty"):
        export(case, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    export(other, out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other.safetensors", "out"]


def test_what_fails_verification_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path / "model", "llama")
    monkeypatch.setattr(dense, "masked", lambda weight, mask: weight)
    with pytest.raises(VerificationError, match="more non-zeros than 2:4 allows"):
        export(case, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_card(tmp_path: Path) -> None:
    case = make_case(tmp_path / "model", "llama")
    metrics = [
        {"method": "dense", "perplexities": {"wikitext2": 5.123, "c4": 7.0}},
        {"method": "learned", "perplexities": {"wikitext2": 6.789, "c4": 8.5}},
        {"method": "magnitude", "perplexities": {}},
    ]
    recipe = "# mine\nseed: 7\n"
    export(case, tmp_path / "out", recipe_text=recipe, metrics=metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: transformers" in front
    assert "base_model" not in front  # a local folder is no name on the hub
    dropped = sum(int((~mask).sum()) for mask in case.masks.masks.values())
    total = sum(parameter.numel() for parameter in case.loaded.model.parameters())
    assert f"in {len(case.masks.masks)} parameters: {dropped:,} of {total:,} weights are zero" in card
    assert "those of the original, bit for bit" in card
    assert "| method | wikitext2 | c4 |" in card
    assert "| learned | 6.79 | 8.50 |" in card
    assert "magnitude" not in card
    assert f"```yaml\n{recipe}```" in card
    assert "| transformers | yes" in card
    assert "US-2025/0335769-A1" in card


def test_the_card_of_updated_weights_does_not_say_that_they_are_the_original(tmp_path: Path) -> None:
    case = make_case(tmp_path / "model", "llama")
    weights = {name: case.meant(name) * 2 for name in case.masks.masks}
    export(case, tmp_path / "out", weights=weights)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "were updated by SparseGPT" in card
    assert "bit for bit" not in card
    assert all(torch.equal(tensors_of(tmp_path / "out")[name], weights[name]) for name in weights)


def test_the_mask_as_a_file_of_either_format(tmp_path: Path) -> None:
    case = make_case(tmp_path / "model", "gpt2")
    export_mask(case.masks, tmp_path / "copy.safetensors")
    copy = load_masks(tmp_path / "copy.safetensors")
    assert mask_digest(copy.masks) == mask_digest(case.masks.masks)
    assert (copy.contracted, copy.metadata) == (case.masks.contracted, case.masks.metadata)
    assert (tmp_path / "copy.safetensors").read_bytes() == case.mask.read_bytes()

    export_mask(case.masks, tmp_path / "new" / "mask_compressed.npz")
    published = load_npz(tmp_path / "new" / "mask_compressed.npz", case.masks.shapes, case.masks.contracted)
    assert mask_digest(published) == mask_digest(case.masks.masks)
    with np.load(tmp_path / "new" / "mask_compressed.npz", allow_pickle=False) as file:
        name = next(iter(case.masks.masks))
        flat = case.masks.masks[name].numpy().reshape(-1)
        assert sorted(file.files) == sorted(f"{name}.mask" for name in case.masks.masks)
        assert (np.unpackbits(file[f"{name}.mask"])[: flat.size] == flat).all()


def test_a_mask_file_does_not_replace_another_unasked(tmp_path: Path) -> None:
    case = make_case(tmp_path / "model", "llama")
    (tmp_path / "mask.npz").write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        export_mask(case.masks, tmp_path / "mask.npz")
    with pytest.raises(UsageError, match=r"\.safetensors or an \.npz file, not mask\.pt"):
        export_mask(case.masks, tmp_path / "mask.pt")
    assert (tmp_path / "mask.npz").read_text() == "precious"
    export_mask(case.masks, tmp_path / "mask.npz", overwrite=True)
    assert load_npz(tmp_path / "mask.npz", case.masks.shapes, case.masks.contracted).keys() == case.masks.masks.keys()


def test_torchao_gets_its_own_serialised_configuration(tmp_path: Path) -> None:
    case = make_case(tmp_path / "model", "llama")
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["export", str(case.source), "--mask", str(case.mask), "--format", "torchao-fp8-24", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    config = json.loads((out / "torchao_config.json").read_text())
    assert config["_type"] == "Float8DynamicActivationFloat8WeightConfig"
    row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    packing = {"_type": "Float8PackingFormat", "_data": "SPARSE_2D_DATA_2D_METADATA"}
    assert config["_data"] == {"granularity": [row, row], "packing_format": packing}
    line = shlex.split(result.stdout.splitlines()[-1].partition(": ")[2])
    assert line[:3] == ["vllm", "serve", str(out)]
    assert json.loads(line[-1]) == {"quantization_config_file": str(out / "torchao_config.json")}
    assert "not verified" in result.stdout
    card = (out / "README.md").read_text()
    assert "Not verified" in card
    assert "vllm serve FOLDER" in card
    # The rest is a dense export.
    assert (out / "config.json").read_bytes() == (case.source / "config.json").read_bytes()
    assert verify_checkpoint(out).ok


def test_torchao_itself_reads_the_configuration() -> None:
    core = pytest.importorskip("torchao.core.config")
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.quantize_.workflows import Float8PackingFormat

    expected = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), packing_format=Float8PackingFormat.SPARSE_CUTLASS
    )
    assert core.config_from_dict(json.loads(torchao24.config_file())) == expected


def test_torchao_is_refused_what_it_would_compute_wrongly(tmp_path: Path) -> None:
    llama, mixtral = make_case(tmp_path / "llama", "llama"), make_case(tmp_path / "mixtral", "mixtral")
    with pytest.raises(UsageError, match="no experts"):
        torchao24.check_servable(mixtral.loaded.model, mixtral.masks.masks, P24)
    with pytest.raises(UsageError, match="this mask is 4:8"):
        torchao24.check_servable(llama.loaded.model, llama.masks.masks, Pattern(4, 8))
    with pytest.raises(UsageError, match=rf"{UP} is not masked"):
        torchao24.check_servable(llama.loaded.model, set(llama.masks.masks) - {UP}, P24)
    torchao24.check_servable(llama.loaded.model, llama.masks.masks, P24)
