"""transformers on packed folders: loading, generating and saving through its own classes, once compress.hf is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_configs
import torch
from packed_fixtures import Case, make_case, tensors_of
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.hf import Packed24Config, Packed24Quantizer
from compress.runtime import Sparse24Linear

TOKENS = tiny_configs.tokens(batch=1, length=6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_from_pretrained_generate_and_save_pretrained(architecture: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    case.pack(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(model.hf_quantizer, Packed24Quantizer)
    dense = case.loaded.model
    for name in case.masks.masks:
        dense.get_parameter(name).data = case.meant(name)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = dense.generate(TOKENS, **options)
    assert torch.equal(model.generate(TOKENS, **options), expected)

    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")  # under transformers' own names, in shards of its own
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written == json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    sizes = [sum(t.nbytes for t in tensors_of(tmp_path / folder).values()) for folder in ("packed", "again")]
    assert sizes[0] == sizes[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again.generate(TOKENS, **options), expected)


def test_the_type_and_the_arguments_of_from_pretrained_work(llama: Case, tmp_path: Path) -> None:
    llama.pack(tmp_path / "packed", values="int8", activations="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16, device_map="cpu")
    layers = [module for module in model.modules() if isinstance(module, Sparse24Linear)]
    assert len(layers) == len(llama.masks.masks)
    assert {layer.activation for layer in layers} == {"int8"}
    assert {layer.values.dtype for layer in layers} == {torch.int8}
    assert {layer.scale.dtype for layer in layers if layer.scale is not None} == {torch.float32}
    assert model(TOKENS).logits.dtype == torch.bfloat16
    assert not hasattr(layers[0], "weight")  # no placeholder is left
    assert model.hf_quantizer.is_serializable()
    assert not model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable


def test_experts_are_not_said_to_compile_into_one_graph(tmp_path: Path) -> None:
    case = make_case(tmp_path, "mixtral")
    case.pack(tmp_path / "packed")
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "packed").hf_quantizer.is_compileable


def test_a_broken_folder_is_an_error_here_too(llama: Case, tmp_path: Path) -> None:
    llama.pack(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match="version 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_nothing_is_packed_on_the_fly(llama: Case) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(llama.source, quantization_config=Packed24Config())


def test_without_the_import_transformers_warns_and_does_not_load_the_weights(llama: Case, tmp_path: Path) -> None:
    """What the model card says of transformers alone."""
    llama.pack(tmp_path / "packed")
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'packed')!r}, output_loading_info=True)\n"
        "print(len(info['missing_keys']))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Unknown quantization type, got compress-packed-24" in result.stderr
    assert int(result.stdout.split()[-1]) == len(llama.masks.masks)
