"""Vision-language mixtures: blocks walked one by one with DeepStack between them, calibration on images, quantising and loading again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from text_fixtures import prose, tiny_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import CompressError, UsageError
from compress.evaluate import perplexity
from compress.models import LoadedModel, load_model, meta_model, model_class
from compress.moe.profile import profile_experts
from compress.moe.profile_store import ProfileStore
from compress.quantize import images
from compress.quantize.model import quantize_model
from compress.quantize.quantizer import Quantizer
from compress.quantize.session import _bytes_of
from compress.quantize.store import QuantizedStore
from compress.recipe_file import check_recipe
from compress.recipe_quantize import ImagesSection
from compress.stream import StreamedModel, open_streamed
from compress.structure import decoder_blocks
from compress.walk import catch_calls, eager_experts, measuring
from compress.weights import find_weights

SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
START, END, IMAGE, VIDEO = 300, 301, 302, 303
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the processor of Qwen3-VL needs torchvision (the extra `vision`)"
)


def tokenizer() -> Any:
    words = tiny_tokenizer()
    words.add_special_tokens({"additional_special_tokens": SPECIAL})
    assert words.convert_tokens_to_ids(SPECIAL) == [START, END, IMAGE, VIDEO]
    return words


def qwen3_vl_moe(layers: int = 4) -> Any:
    """A random model whose vision tower gives features to the first two gaps between the blocks."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "num_hidden_layers": layers,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "max_position_embeddings": 256, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model = model_class(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def with_image(side: int = 4, words: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """What the processor gives for an image of `side` x `side` patches and some text."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(4, 300, (2, words), generator=draw)
    middle = torch.tensor([START, *[IMAGE] * (side * side // 4), END])
    ids = torch.cat([text[0], middle, text[1]])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(side * side, 3 * 2 * 4 * 4, generator=draw),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def mixed() -> list[Any]:
    draw = torch.Generator().manual_seed(9)
    text = torch.randint(4, 300, (2, 24), generator=draw)
    return [text, with_image(), with_image(4, 5, seed=1), with_image(8, 9, seed=2), text.flip(0)]


def forward(model: Any, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(input_ids=batch)


def in_memory(model: Any) -> StreamedModel:
    return StreamedModel(LoadedModel(model, tokenizer(), "test"), None, torch.device("cpu"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("vl") / "model"
    qwen3_vl_moe().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_blocks_walked_one_by_one_put_out_what_the_model_does() -> None:
    model = qwen3_vl_moe()
    blocks = decoder_blocks(model)
    assert [b.name for b in blocks] == [f"model.language_model.layers.{i}" for i in range(4)]
    assert all("visual" not in ref.full_name for ref in find_weights(model))
    outputs: dict[int, Tensor] = {}
    hooks = [b.module.register_forward_hook(lambda m, a, out, i=b.index: outputs.update({i: out})) for b in blocks]  # type: ignore[misc]
    with measuring(model):
        walked = list(catch_calls(model, blocks, mixed()))
        for (state, calls), batch in zip(walked, mixed(), strict=True):
            gaps = [call.added is not None for call in calls]
            assert gaps == ([False, True, True, False] if isinstance(batch, dict) else [False] * 4)
            forward(model, batch)
            expected = dict(outputs)
            for call, i in zip(calls, range(4), strict=True):
                state = call.run(state)
                assert torch.equal(state, expected[i])
    for hook in hooks:
        hook.remove()
    first, second = walked[1][1], walked[2][1]  # images of one shape: position embeddings are shared, features are not
    assert first[0] is second[0]
    assert first[3] is second[3]
    assert not torch.equal(first[1].added, second[1].added)  # type: ignore[arg-type]
    with measuring(model):  # a constant image feature matters: without it the walk would be another
        state, calls = walked[1]
        bare = calls[0].run(state)
        assert not torch.allclose(calls[1].run(bare), calls[1].module(bare, *calls[1].args, **calls[1].kwargs))


def test_what_is_no_addition_is_refused_even_if_only_images_meet_it() -> None:
    model = qwen3_vl_moe()
    text = model.model.language_model
    text._deepstack_process = lambda hidden, mask, features: hidden * 1.5
    with measuring(model):
        list(catch_calls(model, decoder_blocks(model), [mixed()[0]]))
        with pytest.raises(CompressError, match="straight after"):
            list(catch_calls(model, decoder_blocks(model), mixed()))


def test_text_alone_is_evaluated_and_generated(saved: Path) -> None:
    loaded = load_model(str(saved))
    streamed = open_streamed(str(saved), stream=True)
    assert type(loaded.model).__name__ == type(streamed.model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert all(p.is_meta for p in meta_model(str(saved)).parameters())
    found = [perplexity(m, loaded.tokenizer, prose(400), seqlen=64) for m in (loaded.model, streamed.model)]
    assert found[0].perplexity == found[1].perplexity
    with pytest.raises(UsageError, match="256 positions"):
        perplexity(loaded.model, loaded.tokenizer, prose(400), seqlen=300)
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
    with torch.no_grad():
        assert torch.equal(streamed.model(**with_image()).logits, loaded.model(**with_image()).logits)


def test_experts_are_profiled_and_quantised_on_images_and_text(saved: Path, tmp_path: Path) -> None:
    stores = []
    for streamed in (in_memory(load_model(str(saved)).model), open_streamed(str(saved), stream=True)):
        refs, here = find_weights(streamed.model), tmp_path / str(len(stores))
        profile = ProfileStore(here / "profile", {})
        assert profile_experts(streamed, refs, mixed(), ((2, 16), (4, 16)), Quantizer(), profile)
        tokens = sum(b["input_ids"].numel() if isinstance(b, dict) else b.numel() for b in mixed())
        assert profile.read(2).frequency.sum() == 2 * tokens
        store = QuantizedStore(here / "quantized")
        widths = {i: [dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (3, 16))] * 4 for i in range(4)}
        assert quantize_model(streamed, refs, mixed(), widths, {}, Quantizer(), store)
        stores.append((profile, store))
    (profile, store), (again, other) = stores
    assert [profile.file(i).read_bytes() for i in range(4)] == [again.file(i).read_bytes() for i in range(4)]
    assert all(store.file(i).read_bytes() == other.file(i).read_bytes() for i in range(4))
    model = load_model(str(saved)).model  # the routing that was profiled is that of the whole model
    chosen: list[Tensor] = []
    experts = decoder_blocks(model)[2].module.mlp.experts  # type: ignore[union-attr]
    experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].flatten()))  # type: ignore[operator, union-attr]
    with torch.no_grad(), eager_experts(model):
        for batch in mixed():
            forward(model, batch)
    assert np.array_equal(profile.read(2).frequency, np.bincount(torch.cat(chosen).numpy(), minlength=4))


def test_gradients_and_images_exclude_each_other(saved: Path, tmp_path: Path) -> None:
    streamed = in_memory(load_model(str(saved)).model)
    with pytest.raises(UsageError, match="token ids alone"):
        profile_experts(
            streamed, find_weights(streamed.model), mixed(), ((2, 16),), Quantizer(), ProfileStore(tmp_path, {}), fisher=True
        )
    with pytest.raises(UsageError, match="exclude each other"):
        check_recipe({**recipe(saved, tmp_path), "allocate": {"mode": "fisher", "average_bits": 2}}, "here")


def test_batches_are_told_apart() -> None:
    one = with_image()
    assert _bytes_of(one) == _bytes_of(dict(reversed(list(one.items()))))
    assert _bytes_of(one) != _bytes_of({**one, "pixel_values": one["pixel_values"] + 1})
    assert _bytes_of(one) != _bytes_of({**one, "pixel_values": one["pixel_values"].reshape(8, -1)})


class FakeProcessor:
    """Takes any image and says what it was given."""

    image_processor = object()
    chat_template: str | None = TEMPLATE
    image_token = "<|image_pad|>"

    def apply_chat_template(self, turns: list[Any], **options: Any) -> dict[str, Tensor]:
        assert options == {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        image, text = turns[0]["content"]
        return self._made(image["image"], text["text"])

    def __call__(self, images: list[Any], text: str, return_tensors: str) -> dict[str, Tensor]:
        return self._made(images[0], text)

    def _made(self, image: Any, text: str) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([list(text.encode())]), "pixel_values": torch.tensor(np.asarray(image) / 255)}


def pictures(folder: Path, count: int = 5) -> Path:
    image = pytest.importorskip("PIL.Image")
    (folder / "photos").mkdir()
    lines = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (16 + 8 * (i % 2), 16, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
        lines.append(json.dumps({"picture": f"photos/{i}.png", "question": f"the mask {i}"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder / "data.jsonl"


def section(file: Path, **changes: Any) -> ImagesSection:
    return ImagesSection(**{"path": str(file), "image_field": "picture", "prompt_field": "question", "samples": 3, **changes})


def test_records_become_the_arguments_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = FakeProcessor()
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    loaded = LoadedModel(qwen3_vl_moe(1).to(torch.bfloat16), tokenizer(), "test/model")
    file = pictures(tmp_path)
    chosen = images.image_batches(section(file), loaded, seed=1)
    texts = [bytes(inputs["input_ids"][0].tolist()).decode() for inputs in chosen]
    assert len(set(texts)) == 3
    for text, inputs in zip(texts, chosen, strict=True):
        pixels = np.random.default_rng(int(text[-1])).integers(0, 256, (16 + 8 * (int(text[-1]) % 2), 16, 3), dtype=np.uint8)
        assert torch.equal(inputs["pixel_values"], torch.tensor(pixels / 255).to(torch.bfloat16))
    again = images.image_batches(section(file), loaded, seed=1)
    assert [_bytes_of(a) for a in again] == [_bytes_of(b) for b in chosen]
    everything = images.image_batches(section(file, samples=5), loaded, seed=2)
    assert len({_bytes_of(inputs) for inputs in everything}) == 5
    processor.chat_template = None
    plain = images.image_batches(section(file), loaded, seed=1)
    assert [bytes(inputs["input_ids"][0].tolist()).decode() for inputs in plain] == [f"<|image_pad|>{text}" for text in texts]
    with pytest.raises(UsageError, match="only 5 records"):
        images.image_batches(section(file, samples=6), loaded, seed=0)
    (tmp_path / "photos" / "0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"0\.png cannot be read as an image"):
        images.image_batches(section(file, samples=5), loaded, seed=0)


def test_faulty_records_are_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    for line, message in (
        ("{", "line 2 is not JSON"),
        ('{"picture": "a.png"}', "line 2 has no text in the field 'question'|line 2 has no text in the field 'picture'"),
        ("[]", "line 2 has no text"),
        ('{"picture": "none.png", "question": "x"}', "there is no image"),
    ):
        file.write_text("\n" + line, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            images.read_records(section(file))
    with pytest.raises(UsageError, match="cannot be read"):
        images.read_records(section(tmp_path / "other.jsonl"))


def test_a_model_without_a_processor_is_refused(saved: Path, tmp_path: Path) -> None:
    loaded = LoadedModel(qwen3_vl_moe(1), tokenizer(), str(saved), saved)
    with pytest.raises(UsageError, match=r"processor"):
        images.image_batches(section(pictures(tmp_path)), loaded, seed=0)


def recipe(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "text.txt").write_text(prose(4000), encoding="utf-8")
    source = {"path": str(folder / "text.txt")}
    found = {
        "recipe": "quantize",
        "model": {"source": str(model)},
        "stream": True,
        "data": {"sources": [source], "seqlen": 64},
        "samples": 8,
        "images": section(folder / "data.jsonl").model_dump(),
        "candidates": [2, 4],
        "quantizer": {"group_size": 16},
        "allocate": {"average_bits": 3},
        "evaluate": {"texts": {"prose": {"source": source, "seqlen": 64, "limit": 4}}},
    }
    return {**found, **changes}


@pytest.mark.parametrize("pictured", [False, pytest.param(True, marks=torchvision)])
def test_a_recipe_runs_to_a_checkpoint_that_loads(pictured: bool, saved: Path, tmp_path: Path) -> None:
    """With images through the real processor of Qwen3-VL."""
    pictures(tmp_path)
    source = saved
    if pictured:
        source = tmp_path / "model"
        load_model(str(saved)).model.save_pretrained(source)
        kinds = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(**kinds, size={"shortest_edge": 64, "longest_edge": 4096}),
            tokenizer(),
            transformers.Qwen3VLVideoProcessor(**kinds),
            chat_template=TEMPLATE,
        ).save_pretrained(source)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(source, tmp_path, **({} if pictured else {"images": None}))), encoding="utf-8")
    dry = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "run"), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    ran = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "run"), "--json"])
    assert ran.exit_code == 0, ran.output
    original, quantized = json.loads(ran.stdout)["summary"]
    made, before = load_model(str(tmp_path / "run" / "model")), load_model(str(source))
    assert type(made.model) is type(before.model)
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    assert perplexity(made.model, made.tokenizer, text, seqlen=64, limit=4).perplexity == pytest.approx(
        quantized["perplexity"], rel=0.02
    )
    assert original["perplexity"] != quantized["perplexity"]
    kept = dict(made.model.named_parameters())
    towers = [name for name, _ in before.model.named_parameters() if ".visual." in name]
    assert len(towers) > 10
    assert all(torch.equal(kept[name], before.model.get_parameter(name)) for name in towers)
    with torch.no_grad():
        logits = made.model(**with_image()).logits
        difference = (logits - before.model(**with_image()).logits).norm() / before.model(**with_image()).logits.norm()
    assert 0 < float(difference) < 1
    if pictured:
        assert "3 images with text" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        tokens = sum(json.loads((tmp_path / "run" / "experts.json").read_text())["frequency"]["0"])
        assert tokens > 2 * 8 * 64  # of text alone, two experts each
        assert transformers.AutoProcessor.from_pretrained(tmp_path / "run" / "model").image_processor.patch_size == 4
