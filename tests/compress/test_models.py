"""Loading from folders, GGUF files and embedded models, and what is said when there is nothing to load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_configs
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerFast

from compress import models as compress_models
from compress.device import pick_device
from compress.errors import CompressError, UsageError
from compress.models import fingerprint, load_model, load_tokenizer, meta_model, resolve_source
from compress.weights import by_parameter, find_weights


def save(folder: Path, model: tiny_configs.Model) -> Path:
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, tiny_configs.VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model", tiny_configs.llama())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "llama4"])
def test_a_folder_loads_with_its_weights_and_tokenizer(tmp_path: Path, name: str) -> None:
    saved = tiny_configs.BUILDERS[name]()
    loaded = load_model(str(save(tmp_path / name, saved)))
    assert {k: p.shape for k, p in loaded.model.named_parameters()} == {k: p.shape for k, p in saved.named_parameters()}
    assert all(torch.equal(p, dict(saved.named_parameters())[k]) for k, p in loaded.model.named_parameters())
    assert fingerprint(loaded.model) == fingerprint(saved)
    assert not loaded.model.training
    assert loaded.tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert (loaded.source, loaded.folder, loaded.gguf_file) == (str(tmp_path / name), tmp_path / name, None)


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: str, got: torch.dtype) -> None:
    source = str(save(tmp_path / "m", tiny_configs.llama().to(stored)))
    assert {p.dtype for p in load_model(source, dtype=asked).model.parameters()} == {got}


def test_an_unknown_dtype_or_device_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="float32"):
        load_model(str(folder), dtype="int3")
    with pytest.raises(UsageError, match="device 'zorp'"):
        load_model(str(folder), device="zorp")


def test_the_meta_model_has_the_shapes_and_no_weights(folder: Path) -> None:
    real, meta = load_model(str(folder)).model, meta_model(str(folder))
    assert {k: p.shape for k, p in meta.named_parameters()} == {k: p.shape for k, p in real.named_parameters()}
    assert {p.dtype for p in meta.parameters()} == {p.dtype for p in real.parameters()}
    assert all(p.is_meta for p in meta.parameters())
    assert not meta.training


def test_a_model_without_tokenizer_loads_when_none_is_wanted(folder: Path) -> None:
    _without_tokenizer(folder)
    loaded = load_model(str(folder), tokenizer=False)
    assert fingerprint(loaded.model) == fingerprint(tiny_configs.llama())
    assert loaded.tokenizer is None


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_device_auto_is_cuda_else_cpu(there: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device(expected)


def test_embedded_models_load() -> None:
    loaded = load_model("asset:tiny-llama")
    assert loaded.folder is not None
    assert loaded.folder.name == "tiny-llama"
    assert loaded.model.config.vocab_size >= len(loaded.tokenizer)
    with pytest.raises(UsageError, match="tiny-llama"):
        load_model("asset:tiny-lama")
    with pytest.raises(UsageError, match="a text"):
        resolve_source("asset:wikitext2-test")


def write_gguf(path: Path, model: tiny_configs.Model) -> None:
    """The smallest Llama GGUF file, in float32, by the format's own writer."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["w", "1", "w1", *(f"t{i}" for i in range(3, config.vocab_size))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.o_proj": "attn_output",
        "self_attn.v_proj": "attn_v",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, p in model.state_dict().items():
        value = p.numpy()
        if name.startswith("model.layers."):
            index, rest = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp pairs the rotated channels as neighbours
                heads = config.num_attention_heads if "q_" in rest else config.num_key_value_heads
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{index}.{names.get(rest, 'attn_' + rest.split('.')[-1][0])}.weight", value)
        else:
            top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            writer.add_tensor(top.get(name, "output.weight"), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_by_its_name_and_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_configs.llama()
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model)
    capsys.readouterr()
    for source in (str(file), str(tmp_path)):
        loaded = load_model(source)
        assert (loaded.folder, loaded.gguf_file) == (tmp_path, "tiny.gguf")
        assert {k for k, p in loaded.model.named_parameters() if p.dtype == torch.float32} == set(model.state_dict())
        assert all(torch.equal(p, model.state_dict()[k]) for k, p in loaded.model.named_parameters())
        assert "quantization_config" not in loaded.model.config.to_dict()
        meta = meta_model(source)
        assert {k: (p.shape, p.dtype) for k, p in meta.named_parameters()} == {
            k: (p.shape, p.dtype) for k, p in loaded.model.named_parameters()
        }
        assert all(p.is_meta for p in meta.parameters())
    assert capsys.readouterr() == ("", "")  # neither progress bars nor advice
    loaded.model.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(model.state_dict())
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(UsageError, match=r"other\.gguf, tiny\.gguf"):
        resolve_source(str(tmp_path))
    monkeypatch.setattr(compress_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'maskllm-compress\[gguf\]'"):
        load_model(str(file))


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "zorp"}))


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _one_weight_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _one_weight_misshapen(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_config, r"no config\.json .*model\.safetensors"),
        (_unknown_architecture, "zorp"),
        (_broken_config, "not a valid JSON"),
        (_without_weights, r"model\.safetensors"),
        (_one_weight_missing, r"missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (_one_weight_misshapen, r"another shape .*\(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (_without_tokenizer, "has no tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_truncated_checkpoint_is_a_compress_error(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CompressError, match=str(folder)):
        load_model(str(folder))


@pytest.mark.parametrize("source", ["./nowhere", "../a/b", "/no/such/folder", "a/b/c", "missing.gguf"])
def test_a_path_that_is_not_there(source: str) -> None:
    with pytest.raises(UsageError, match="no model at"):
        load_model(source)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no \.gguf"):
        load_model(str(tmp_path / "model.bin"))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"nobody/nothing is no local path.*HF_HUB_OFFLINE.*local folder"):
        load_model("nobody/nothing")
    with pytest.raises(UsageError, match="nobody/nothing"):
        load_tokenizer("nobody/nothing")


def test_fingerprint_tells_values_names_and_types_apart() -> None:
    model = tiny_configs.llama()
    first = fingerprint(model)
    assert first == fingerprint(tiny_configs.llama())
    assert len(first) == 64
    assert fingerprint(tiny_configs.llama().to(torch.bfloat16)) not in (first, fingerprint(tiny_configs.llama().half()))
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert fingerprint(model) != first
    assert fingerprint(tiny_configs.llama(num_hidden_layers=1)) != first


@pytest.mark.parametrize("name", tiny_configs.BUILDERS)
def test_fingerprint_does_not_see_masks(name: str) -> None:
    """GPT-OSS's `gate_up_proj` has a bias of almost its name, which takes its place in the order while a mask hangs over it."""

    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    model = tiny_configs.BUILDERS[name]()
    before = fingerprint(model)
    parameters = by_parameter(find_weights(model))
    for p in parameters:
        parametrize.register_parametrization(p.module, p.parameter_name, Mask())
    assert fingerprint(model) == before
    for p in parameters:
        parametrize.remove_parametrizations(p.module, p.parameter_name, leave_parametrized=False)
    assert fingerprint(model) == before
