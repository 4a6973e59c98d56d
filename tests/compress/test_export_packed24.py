"""Packed exports: what is in the files is mask times original, decoded by an independent reader, from every kind of source."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
from packed_fixtures import P24, Case, case_of, decode, make_case, tensors_of
from safetensors.torch import load_file, save_file
from test_models import write_gguf
from torch import Tensor

import compress
from compress.checkpoint import Checkpoint
from compress.errors import UsageError, VerificationError
from compress.export import packed24
from compress.export.dense import export_dense
from compress.export.packed24 import export_packed
from compress.export.source import FileSource, ModelSource, open_source
from compress.models import load_model
from compress.packed import PackedCheckpoint, PackedMatrix
from maskllm.patterns import Pattern
from maskllm.storage import load_masks, save_masks

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def fresh(tmp_path: Path) -> Case:
    return make_case(tmp_path / "model", "llama")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_files_hold_mask_times_original(architecture: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    case.pack(tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((case.source / "config.json").read_text())
    assert (quantization["quant_method"], quantization["version"], quantization["pattern"]) == ("compress-packed-24", 1, "2:4")
    assert (quantization["values"], quantization["activations"]) == ("fp32", "float")
    assert set(quantization["matrices"]) == set(case.masks.masks)
    for name, entry in quantization["matrices"].items():
        meant = case.meant(name)
        dim = case.masks.contracted[name]
        assert entry == {"shape": list(meant.shape), "contracted_dim": dim}
        base = name.removesuffix("weight") if name.endswith(".weight") else name + "_"
        values, meta = tensors.pop(base + "values"), tensors.pop(base + "meta")
        meant = meant if dim == -1 else meant.mT  # [..., N, K]
        n, k = meant.shape[-2:]
        assert values.dtype == torch.float32
        assert values.shape == (*meant.shape[:-2], n, k // 2)
        assert (meta.dtype, meta.shape) == (torch.uint8, (*meant.shape[:-2], n, math.ceil(k / 8)))
        assert torch.equal(decode(values.view(-1, k // 2), meta.view(-1, meta.shape[-1])), meant.reshape(-1, k))
    original = tensors_of(case.source)
    assert tensors
    assert all(torch.equal(tensor, original[name]) for name, tensor in tensors.items())
    norms = [name for name in original if "norm" in name or "ln_" in name or "embed" in name]
    assert norms
    assert set(norms) <= tensors.keys()


@pytest.mark.parametrize(("values", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_values_are_rounded_to_their_type_and_nothing_else(llama: Case, tmp_path: Path, values: str, dtype: torch.dtype) -> None:
    result = llama.pack(tmp_path / "out", values=values)
    packed = PackedCheckpoint(tmp_path / "out")
    assert [matrix.name for matrix in packed.matrices] == list(llama.masks.masks)
    for matrix in packed.matrices:
        assert torch.equal(packed.dense(matrix), llama.meant(matrix.name).to(dtype))
    assert result.zeros == sum(int((~mask).sum()) for mask in llama.masks.masks.values())
    assert all(report.ok for report in result.reports)


def test_int8_has_the_scale_of_the_largest_weight_of_each_row(llama: Case, tmp_path: Path) -> None:
    llama.pack(tmp_path / "out", values="int8", activations="int8")
    tensors = tensors_of(tmp_path / "out")
    meant, base = llama.meant(UP), UP.removesuffix("weight")
    scale = meant.abs().amax(1) / 127
    assert torch.equal(tensors[base + "scale"], scale)
    q = decode(tensors[base + "values"], tensors[base + "meta"])
    assert torch.equal(q, (meant / scale[:, None]).round().to(torch.int8))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["activations"] == "int8"


def test_a_sparse_checkpoint_packs_without_a_mask_to_the_same_bytes(llama: Case, tmp_path: Path) -> None:
    llama.pack(tmp_path / "masked")
    export_dense(llama.loaded, dict(llama.masks.masks), tmp_path / "dense", pattern=P24, contracted=llama.masks.contracted)
    for keep in (True, False):  # with and without the list in compress.json
        if not keep:
            (tmp_path / "dense" / "compress.json").unlink()
        export_packed(open_source(str(tmp_path / "dense")), tmp_path / "zeros", overwrite=True)
        assert (tmp_path / "zeros" / "model.safetensors").read_bytes() == (tmp_path / "masked" / "model.safetensors").read_bytes()


def test_only_what_compress_json_lists_is_packed(llama: Case, tmp_path: Path) -> None:
    masks = {name: mask for name, mask in llama.masks.masks.items() if "mlp" in name}
    dims = {name: llama.masks.contracted[name] for name in masks}
    export_dense(llama.loaded, masks, tmp_path / "dense", pattern=P24, contracted=dims)
    result = export_packed(open_source(str(tmp_path / "dense")), tmp_path / "out")
    assert {matrix.name for matrix in result.matrices} == set(masks)
    assert "model.layers.0.self_attn.q_proj.weight" in tensors_of(tmp_path / "out")


def test_a_matrix_that_is_not_sparse_is_named_and_can_be_left_out(llama: Case, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    shutil.copytree(llama.source, source)
    tensors = load_file(source / "model.safetensors")
    for name in llama.masks.masks:
        tensors[name] = llama.meant(name)
    tensors[UP][3, 4:8] = 1.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=rf"{UP}: not a 2:4 matrix: row 3, group 1.*--exclude"):
        export_packed(open_source(str(source)), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sparse"]
    result = export_packed(open_source(str(source)), tmp_path / "out", exclude=["*layers.1.mlp.up_proj*"])
    assert UP not in {matrix.name for matrix in result.matrices}
    assert torch.equal(tensors_of(tmp_path / "out")[UP], tensors[UP])


def test_groups_with_fewer_than_two_weights_keep_a_legal_code(llama: Case, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    shutil.copytree(llama.source, source)
    tensors = load_file(source / "model.safetensors")
    for name in llama.masks.masks:
        tensors[name] = llama.meant(name)
    tensors[UP][0] = 0.0
    tensors[UP][1, 2:] = 0.0
    tensors[UP][2] = -0.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    export_packed(open_source(str(source)), tmp_path / "out")
    parts, base = tensors_of(tmp_path / "out"), UP.removesuffix("weight")
    assert torch.equal(decode(parts[base + "values"], parts[base + "meta"]), tensors[UP])


def test_nan_and_infinity_are_kept_where_the_mask_keeps_them(fresh: Case, tmp_path: Path) -> None:
    tensors = load_file(fresh.source / "model.safetensors")
    kept = fresh.masks.masks[UP].nonzero()[:3]
    dropped = (~fresh.masks.masks[UP]).nonzero()[:2]
    for (row, column), value in zip(kept.tolist(), (math.nan, math.inf, -math.inf), strict=True):
        tensors[UP][row, column] = value
    for (row, column), value in zip(dropped.tolist(), (math.nan, math.inf), strict=True):
        tensors[UP][row, column] = value
    save_file(tensors, fresh.source / "model.safetensors", {"format": "pt"})
    fresh.pack(tmp_path / "out")
    dense = PackedCheckpoint(tmp_path / "out").dense(PackedMatrix(UP, tuple(tensors[UP].shape), -1, "fp32"))
    meant = torch.where(fresh.masks.masks[UP], tensors[UP], 0.0)
    assert torch.equal(dense.view(torch.int32), meant.view(torch.int32))
    with pytest.raises(UsageError, match=rf"{UP}: row .* NaN or an infinity, which int8 cannot hold"):
        fresh.pack(tmp_path / "int8", values="int8")


def test_what_fp16_cannot_hold_is_an_error(fresh: Case, tmp_path: Path) -> None:
    tensors = load_file(fresh.source / "model.safetensors")
    row, column = fresh.masks.masks[UP].nonzero()[0].tolist()
    tensors[UP][row, column] = 70000.0
    save_file(tensors, fresh.source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=rf"{UP}: row 0 has a weight beyond the range"):
        fresh.pack(tmp_path / "out", values="fp16")
    fresh.pack(tmp_path / "out", values="bf16")


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_sharded_source_gives_a_sharded_export_with_an_index(architecture: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    case.pack(tmp_path / "one")
    case.loaded.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    export_packed(open_source(str(tmp_path / "shards")), tmp_path / "out", masks=case.masks)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "out")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    tokens = tiny_configs.tokens()
    with torch.no_grad():
        logits = [compress.load(tmp_path / name, device="cpu")(tokens).logits for name in ("one", "out")]
    assert torch.equal(*logits)


def test_one_matrix_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path, "mixtral")
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = FileSource.matrix

    def watched(self: FileSource, *args: Any) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive) + 1)
        tensor = read(self, *args)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(FileSource, "matrix", watched)
    monkeypatch.setattr(packed24, "masked", lambda weight, mask: weight.mul_(mask))  # keeps the tensor itself, so that it is seen
    export_packed(open_source(str(case.source)), tmp_path / "out", masks=case.masks)
    assert len(alive) == 2 * (2 * 4 + 2 * 2 * 4)  # every matrix once to pack and once to verify
    assert most <= 2  # the one being read, and the one before it


def test_a_hub_name_is_read_from_the_hub_cache(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--someone--tiny"
    commit = "0123456789012345678901234567890123456789"
    shutil.copytree(llama.source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    source = open_source("someone/tiny")
    assert isinstance(source, FileSource)
    export_packed(source, tmp_path / "out", masks=llama.masks)
    llama.pack(tmp_path / "direct")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "direct" / "model.safetensors").read_bytes()
    assert "base_model: someone/tiny" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UsageError, match="no local path, and the hub does not give it"):
        open_source("someone/absent")


def test_a_gguf_file_is_packed_as_what_it_dequantises_to(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "model.gguf", tiny_configs.llama())
    case = case_of(tmp_path / "gguf" / "model.gguf", tmp_path / "mask.safetensors")
    source = open_source(str(case.source))
    assert isinstance(source, ModelSource)
    export_packed(source, tmp_path / "out", masks=case.masks, values="fp32")
    packed = PackedCheckpoint(tmp_path / "out")
    assert all(torch.equal(packed.dense(matrix), case.meant(matrix.name)) for matrix in packed.matrices)
    again = load_model(str(tmp_path / "out"))
    tokens = tiny_configs.tokens()
    for name in case.masks.masks:
        case.loaded.model.get_parameter(name).data = case.meant(name)
    with torch.no_grad():
        assert torch.allclose(again.model(tokens).logits, case.loaded.model(tokens).logits, atol=1e-5)
    assert again.tokenizer is not None


def test_a_tied_weight_of_a_model_in_memory_is_written_once(tmp_path: Path) -> None:
    case = make_case(tmp_path, "qwen3")
    export_packed(ModelSource(case.loaded), tmp_path / "out", masks=case.masks)
    case.pack(tmp_path / "streamed")
    ours, streamed = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "streamed")
    assert ours.keys() == streamed.keys()
    assert "model.embed_tokens.weight" in ours
    assert "lm_head.weight" not in ours
    assert all(torch.equal(ours[name], streamed[name]) for name in ours)


def test_a_model_in_memory_is_split_into_shards_by_size(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.export.source.SHARD_BYTES", 20_000)
    export_packed(ModelSource(llama.loaded), tmp_path / "out", masks=llama.masks)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    llama.pack(tmp_path / "one")
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "out")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_other_patterns_and_foreign_masks_are_refused(llama: Case, tmp_path: Path) -> None:
    pattern = Pattern(4, 8)
    masks = {UP: pattern.best_of(torch.rand(llama.masks.shapes[UP]))}
    save_masks(tmp_path / "48.safetensors", masks, pattern, {UP: -1})
    with pytest.raises(UsageError, match=r"packed-24 holds 2:4 masks, and this mask is 4:8; use --format dense"):
        export_packed(open_source(str(llama.source)), tmp_path / "out", masks=load_masks(tmp_path / "48.safetensors"))
    save_masks(tmp_path / "foreign.safetensors", {"other.weight": P24.best_of(torch.rand(8, 8))}, P24, {"other.weight": -1})
    with pytest.raises(UsageError, match=r"the mask of other.weight \[8, 8\] does not belong"):
        export_packed(open_source(str(llama.source)), tmp_path / "out", masks=load_masks(tmp_path / "foreign.safetensors"))
    with pytest.raises(UsageError, match="int8 activations go with int8 values"):
        llama.pack(tmp_path / "out", values="bf16", activations="int8")
    assert not (tmp_path / "out").exists()


def test_experts_that_no_runtime_can_replace_are_refused_at_once(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama4")
    with pytest.raises(UsageError, match=r"lies in a Llama4TextExperts.*--format dense"):
        case.pack(tmp_path / "out")


def test_a_packed_checkpoint_is_not_packed_again(llama: Case, tmp_path: Path) -> None:
    llama.pack(tmp_path / "out")
    with pytest.raises(UsageError, match="quantised checkpoint"):
        open_source(str(tmp_path / "out"))


def test_nothing_foreign_is_overwritten_and_a_failure_leaves_the_old_export(
    fresh: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            fresh.pack(thesis, overwrite=overwrite)
        with pytest.raises(UsageError):
            fresh.pack(fresh.source, overwrite=overwrite)
    out = tmp_path / "out"
    fresh.pack(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def broken(name: str, packed: Any, meant: Tensor) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(packed24, "compare_packed", broken)
    with pytest.raises(OSError, match="no space"):
        fresh.pack(out, values="bf16", overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "thesis"]
    monkeypatch.undo()
    fresh.pack(out, values="bf16", overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} != before


@pytest.mark.parametrize(
    "flip",
    [
        lambda read: lambda self, name: read(self, name) ^ 0x88 if name.endswith("up_proj.meta") else read(self, name),
        lambda read: lambda self, name: read(self, name) + 1 if name.endswith("up_proj.values") else read(self, name),
    ],
)
def test_a_wrong_byte_on_disk_fails_the_verification(
    fresh: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: Callable[..., Any]
) -> None:
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", flip(read))
    with pytest.raises(Exception, match="up_proj") as caught:
        fresh.pack(tmp_path / "out")
    assert caught.value.exit_code in (1, 3)  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()


def test_a_changed_tensor_that_is_not_packed_fails_the_verification(
    fresh: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read
    seen: list[str] = []

    def changed(self: Checkpoint, name: str) -> Tensor:
        seen.append(name)
        return read(self, name) + (1 if name == "model.norm.weight" and seen.count(name) == 2 else 0)

    monkeypatch.setattr(Checkpoint, "read", changed)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        fresh.pack(tmp_path / "out")


def test_the_card_says_what_it_is_and_where_it_loads(llama: Case, tmp_path: Path) -> None:
    metrics = [
        {"method": "dense", "perplexities": {"wikitext2": 5.0}},
        {"method": "learned", "perplexities": {"wikitext2": 6.25}},
    ]
    llama.pack(tmp_path / "out", values="bf16", recipe_text="seed: 7\n", metrics=metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    weights = sum(mask.numel() for mask in llama.masks.masks.values())
    total = sum(p.numel() for p in llama.loaded.model.parameters())
    assert f"{weights // 2:,} of {total:,} weights are zero" in card
    assert "9.00 bits each" in card
    assert "| learned | 6.25 |" in card
    assert "```yaml\nseed: 7\n```" in card
    assert "import compress.hf" in card
    assert "| vLLM, SGLang, TensorRT-LLM, llama.cpp | no" in card
    sidecar = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert (sidecar["format"], sidecar["pattern"]) == ("packed-24", "2:4")
    assert sidecar["packed"] == list(llama.masks.masks)
