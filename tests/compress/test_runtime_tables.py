"""Embeddings and heads rounded to int8: what is in the files, and what a model computes with them, through every way of loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
import transformers
from packed_fixtures import Case, case_of, make_case, tensors_of
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

import compress
from compress.bench_model import backend_of, bytes_in_memory
from compress.cli import app
from compress.errors import CompressError, UsageError
from compress.evaluate import evaluate_tokens
from compress.inspect import inspect_checkpoint
from compress.runtime_tables import Int8Embedding, Int8Head, find_tables
from compress.verify_packed import verify_packed_against
from compress_kernels.native import native

TOKENS = tiny_configs.tokens(batch=2, length=9)
# A head of its own; tied to the embedding; tied, with an embedding that scales its rows; with fused experts.
ARCHITECTURES = ("llama", "qwen3", "gemma3", "mixtral")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rounded(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def dense_of(case: Case) -> Any:
    """The dense model with what the packed one stands for."""
    model = copy.deepcopy(case.loaded.model)
    with torch.no_grad():
        for name in case.masks.masks:
            model.get_parameter(name).copy_(case.meant(name))
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        for weight in [model.model.embed_tokens.weight, *([] if tied else [model.lm_head.weight])]:
            weight.copy_(rounded(weight))
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_hold_rounded_rows_and_the_model_computes_with_them(architecture: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    result = case.pack(tmp_path / "out", embedding="int8")
    tied = architecture in ("qwen3", "gemma3")
    assert [table.name for table in result.tables] == [EMBEDDING, *([] if tied else [HEAD])]
    tensors, source = tensors_of(tmp_path / "out"), tensors_of(case.source)
    for table in result.tables:
        values, scale = tensors.pop(table.prefix + "values"), tensors.pop(table.prefix + "scale")
        assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
        torch.testing.assert_close(values * scale[:, None], rounded(source[table.name]))
    assert not {EMBEDDING, HEAD} & tensors.keys()
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["version"] == 2
    assert quantization["int8_tables"] == {table.name: {"shape": [128, 32]} for table in result.tables}

    model, dense = compress.load(tmp_path / "out"), dense_of(case)
    assert isinstance(model.get_output_embeddings(), Int8Head)
    assert isinstance(model.get_input_embeddings(), (Int8Embedding, type(dense.model.embed_tokens)))
    with torch.inference_mode():
        close(model(TOKENS).logits, dense(TOKENS).logits)  # 18 tokens: by torch
        close(model(TOKENS[:1]).logits, dense(TOKENS[:1]).logits)  # 9: by the kernel, where there is one
    assert evaluate_tokens(model, TOKENS).nll == pytest.approx(evaluate_tokens(dense, TOKENS).nll, rel=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS[:1], **options), dense.generate(TOKENS[:1], **options))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_transformers_loads_saves_and_loads_again(architecture: str, tmp_path: Path) -> None:
    make_case(tmp_path, architecture, pad_token_id=2).pack(tmp_path / "out", values="bf16", embedding="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, device_map="cpu")
    assert model.hf_quantizer.is_compileable
    embedding: Any = model.get_input_embeddings()
    assert (embedding.weight.numel(), embedding.weight.dtype) == (0, torch.bfloat16)
    assert (embedding.values.dtype, embedding.scale.dtype) == (torch.int8, torch.float32)
    expected = model(TOKENS).logits
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    sizes = [sum(t.nbytes for t in tensors_of(tmp_path / folder).values()) for folder in ("out", "again")]
    assert sizes[0] >= sizes[1] > sizes[0] - 32 * 1000  # what is not packed is bfloat16 now
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, expected)
    again.tie_weights()  # as what extends models does
    copied = copy.deepcopy(again)
    again.model.embed_tokens.values.zero_()
    assert torch.equal(copied(TOKENS).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_vision_language_models(tied: bool, tmp_path: Path) -> None:
    """Embedding and head lie elsewhere, and another configuration says whether they are tied."""
    text = tiny_configs.gemma3().config.to_dict() | {"tie_word_embeddings": tied}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    sizes = {"vision_config": {**vision, "patch_size": 8}, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "source")
    case = case_of(tmp_path / "source", tmp_path / "mask.safetensors")
    result = case.pack(tmp_path / "out", embedding="int8")
    assert [table.name for table in result.tables] == ["model.language_model.embed_tokens.weight", *([] if tied else [HEAD])]
    case.pack(tmp_path / "dense")
    found, expected = (compress.load(tmp_path / folder)(input_ids=TOKENS).logits for folder in ("out", "dense"))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_outputs_follow_the_model_s_type_and_the_rows_keep_theirs(qwen3: Case, tmp_path: Path) -> None:
    qwen3.pack(tmp_path / "out", embedding="int8")
    model = compress.load(tmp_path / "out")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model.model.embed_tokens(TOKENS).dtype == dtype
        assert model(TOKENS).logits.dtype == dtype
        assert model.model.embed_tokens.values.dtype == torch.int8
        assert model.model.embed_tokens.scale.dtype == torch.float32
    kept = bytes_in_memory(model)
    qwen3.pack(tmp_path / "dense")
    assert bytes_in_memory(compress.load(tmp_path / "dense")) - kept == 128 * 32 * 3 - 128 * 4
    assert backend_of(model) == "2:4 float32, head int8"


@pytest.mark.skipif(native("sparse24").library is None, reason=native("sparse24").reason)
def test_it_decodes_fused(qwen3: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress_kernels.sparse24.decode import Decoder

    qwen3.pack(tmp_path / "out", embedding="int8")
    model, dense = compress.load(tmp_path / "out"), dense_of(qwen3)
    seen, own = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *a: (seen.append(1), own(self, *a))[1])
    cache: Any = DynamicCache(config=model.config)
    with torch.inference_mode():
        parts = [model(TOKENS[:1, :4], past_key_values=cache).logits]
        parts += [model(TOKENS[:1, i : i + 1], past_key_values=cache).logits for i in range(4, 9)]
        close(torch.cat(parts, 1), dense(TOKENS[:1]).logits)
    assert len(seen) == 5


def test_gradients_and_traces_go_through_torch(qwen3: Case, tmp_path: Path) -> None:
    qwen3.pack(tmp_path / "out", embedding="int8")
    head: Any = compress.load(tmp_path / "out").get_output_embeddings()
    weight = rounded(qwen3.loaded.model.lm_head.weight.detach())
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = head(x)
    close(y, x @ weight.T)
    y.sum().backward()
    close(x.grad, weight.sum(0).expand(3, -1))
    compiled: Any = torch.compile(head, backend="eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = x.detach().to(dtype)
        torch.testing.assert_close(compiled(x).float(), x.float() @ weight.T, rtol=0.01, atol=0.05)


def test_every_row_is_verified_against_the_original(qwen3: Case, tmp_path: Path) -> None:
    qwen3.pack(tmp_path / "out", embedding="int8")

    def wrong() -> set[str]:
        return {row.name for row in verify_packed_against(tmp_path / "out", qwen3.masks.masks, qwen3.loaded).rows if not row.ok}

    assert not wrong()
    tensors = tensors_of(tmp_path / "out")
    values = tensors["model.embed_tokens.values"].clone()
    values[5, 7] ^= 16
    save_file({**tensors, "model.embed_tokens.values": values}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert wrong() == {EMBEDDING}


def test_a_tied_head_that_the_source_holds_again_is_not_copied(qwen3: Case, tmp_path: Path) -> None:
    tensors = tensors_of(qwen3.source)
    assert HEAD not in tensors
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, qwen3.source / "model.safetensors", {"format": "pt"})
    try:
        qwen3.pack(tmp_path / "out", embedding="int8")
    finally:
        save_file(tensors, qwen3.source / "model.safetensors", {"format": "pt"})
    assert HEAD not in tensors_of(tmp_path / "out")


def test_inspect_and_the_command_line_show_it(qwen3: Case, tmp_path: Path) -> None:
    arguments = ["export", str(qwen3.mask), "--format", "packed-24", "--embedding", "int8", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert f"rounded {EMBEDDING} to int8: {128 * 32 + 4 * 128:,} bytes, 9.00 bits a weight" in shown
    row = next(row for row in inspect_checkpoint(tmp_path / "out") if row.name == EMBEDDING)
    assert (row.dtype, row.shape, row.nbytes, row.bits) == ("int8", (128, 32), 128 * 32 + 4 * 128, 9.0)
    assert f"Rounded to int8, with one scale a row: {EMBEDDING}" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_rounded_is_said(qwen3: Case, tmp_path: Path) -> None:
    class Own(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return self.weight[input]

    model: Any = tiny_configs.llama()
    find_tables(model)
    model.model.embed_tokens = Own(128, 32)
    with pytest.raises(UsageError, match=r"\(Own and Linear\) cannot be rounded"):
        find_tables(model)
    model = copy.deepcopy(qwen3.loaded.model)
    model.model.embed_tokens.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "source")
    case = Case(tmp_path / "source", qwen3.mask, qwen3.loaded, qwen3.masks)
    with pytest.raises(UsageError, match=r"embed_tokens.weight: row 3 has a NaN .* --embedding dense"):
        case.pack(tmp_path / "out", embedding="int8")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="'int4' is not known"):
        qwen3.pack(tmp_path / "out", embedding="int4")


def test_a_folder_that_contradicts_itself_is_one_error(qwen3: Case, tmp_path: Path) -> None:
    qwen3.pack(tmp_path / "out", embedding="int8")
    file, text = tmp_path / "out" / "config.json", (tmp_path / "out" / "config.json").read_text()

    def refused(tables: Any, message: str) -> None:
        config = json.loads(text)
        config["quantization_config"]["int8_tables"] = tables
        file.write_text(json.dumps(config))
        with pytest.raises(CompressError, match=message):
            compress.load(tmp_path / "out")

    refused({EMBEDDING: {"shape": [128, 16]}}, r"embed_tokens.values is I8 \[128, 32\]")
    refused({EMBEDDING: {}}, "cannot be read")
    refused({EMBEDDING: {"shape": [128]}}, "no embedding and no output head")
    refused({"model.norm.weight": {"shape": [128, 32]}}, "model.norm.values, a part of")
    config = json.loads(text) | {"tie_word_embeddings": False}
    file.write_text(json.dumps(config))
    with pytest.raises(CompressError, match="are not embedding and head of its model"):
        compress.load(tmp_path / "out")
