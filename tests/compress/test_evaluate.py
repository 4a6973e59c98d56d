"""Perplexity and divergence against straightforward code written here."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from text_fixtures import VOCAB, prose, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import compress.evaluate
from compress.assets import asset_path
from compress.errors import CompressError, UsageError
from compress.evaluate import EvalText, evaluate_tokens, evaluation_text, perplexity

TEXT = prose(700)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model().eval()


def by_hand(model: PreTrainedModel, windows: Tensor) -> float:
    """One window at a time, transformers' own loss, mean of the means: as in the published scripts."""
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def cut(ids: list[int], length: int) -> Tensor:
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


# --- the number itself


def test_the_embedded_model_on_wikitext() -> None:
    """The protocol end to end on real weights; the other side of the comparison shares no code with the package."""
    folder = asset_path("tiny-llama")
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tok = AutoTokenizer.from_pretrained(folder)
    found = perplexity(real, tok, evaluation_text("asset:wikitext2-test"), seqlen=256, limit=4)

    text = (folder.parent.parent / "text" / "wikitext2" / "test.txt").read_bytes()
    ids = torch.tensor(tok(text.decode("utf-8")[:20_000])["input_ids"])[: 4 * 256].view(4, 256)
    total = 0.0
    with torch.no_grad():
        for window in ids:
            log_p = torch.log_softmax(real(window[None]).logits[0].double(), -1)
            total -= sum(log_p[i, window[i + 1]].item() for i in range(255))
    assert found.perplexity == pytest.approx(math.exp(total / (4 * 255)), rel=1e-5)
    assert found.perplexity < 300  # it has learned something: a uniform guess scores 4096
    assert (found.windows, found.tokens, found.seqlen, found.bos, found.dtype) == (4, 1020, 256, "none", "float32")
    assert found.data_sha256 == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("limit", [None, 5])
def test_it_is_the_published_protocol(model: PreTrainedModel, batch_size: int, limit: int | None) -> None:
    tok = tiny_tokenizer()
    windows = cut(tok(TEXT)["input_ids"], 64)[:limit]
    found = perplexity(model, tok, TEXT, seqlen=64, limit=limit, batch_size=batch_size)
    assert found.perplexity == pytest.approx(by_hand(model, windows), rel=1e-5)
    assert found.windows == len(windows) == len(found.window_perplexities)
    assert found.tokens == len(windows) * 63
    assert found.window_perplexities[2] == pytest.approx(by_hand(model, windows[2:3]), rel=1e-5)
    assert math.exp(sum(map(math.log, found.window_perplexities)) / found.windows) == pytest.approx(found.perplexity, rel=1e-9)


def test_chunks_of_positions_change_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = cut(tiny_tokenizer()(TEXT)["input_ids"], 64)[:3]
    reference = tiny_model(1).eval()
    whole = evaluate_tokens(model, ids, reference=reference)
    monkeypatch.setattr(compress.evaluate, "_CHUNK_ELEMENTS", 7 * VOCAB)
    parts = evaluate_tokens(model, ids, reference=reference)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.top1_agreement == whole.top1_agreement


def test_bos_as_the_tokenizer_has_it(model: PreTrainedModel) -> None:
    plain, adds, behind = tiny_tokenizer(bos=True), tiny_tokenizer(adds_bos=True), tiny_tokenizer(bos=True, adds_eos=True)
    bare = plain(TEXT, add_special_tokens=False)["input_ids"]
    bos = plain.bos_token_id

    def run(tok: Any, how: Any) -> tuple[float, str]:
        found = perplexity(model, tok, TEXT, seqlen=32, bos=how, limit=9)
        assert ("BOS" in found.protocol) == (found.bos != "none")
        return found.perplexity, found.bos

    none = by_hand(model, cut(bare, 32)[:9])
    once = by_hand(model, cut([bos, *bare], 32)[:9])
    every = by_hand(model, torch.cat([torch.full((9, 1), bos), cut(bare, 31)[:9]], 1))
    assert len({none, once, every}) == 3
    for tok, how, expected, stated in [
        (plain, "auto", none, "none"),
        (adds, "auto", once, "once"),
        (behind, "auto", none, "none"),  # an EOS behind the text is no BOS
        (adds, "none", none, "none"),
        (plain, "every", every, "every window"),
        (adds, "every", every, "every window"),
    ]:
        value, said = run(tok, how)
        assert value == pytest.approx(expected, rel=1e-5)
        assert said == stated


def test_the_default_length_is_what_the_model_can_hold(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tiny_tokenizer()
    assert perplexity(model, tok, TEXT, limit=1).seqlen == 128
    assert perplexity(model, tok, TEXT, limit=1, reference=tiny_model(positions=48).eval()).seqlen == 48
    monkeypatch.setattr(compress.evaluate, "DEFAULT_SEQLEN", 40)
    assert perplexity(model, tok, TEXT, limit=1).seqlen == 40


# --- a reference


def test_divergence_by_brute_force(model: PreTrainedModel) -> None:
    tok, reference = tiny_tokenizer(), tiny_model().eval()
    with torch.no_grad():  # near enough to agree at some positions
        reference.lm_head.weight.add_(torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(5)) * 0.05)
    windows = cut(tok(TEXT)["input_ids"], 32)[:6]
    kl, agreeing, count = 0.0, 0, 0
    with torch.no_grad():
        for window in windows:
            q, p = (m(input_ids=window[None]).logits[0, :-1].double().softmax(-1) for m in (model, reference))
            for position in range(31):
                kl += sum(a * math.log(a / b) for a, b in zip(p[position].tolist(), q[position].tolist(), strict=True))
                agreeing += int(p[position].argmax() == q[position].argmax())
                count += 1
    found = perplexity(model, tok, TEXT, seqlen=32, limit=6, batch_size=4, reference=reference)
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreeing / count)
    assert 0 < agreeing < count
    assert found.perplexity == pytest.approx(by_hand(model, windows), rel=1e-5)  # the model's, not the reference's


def test_a_model_agrees_with_itself(model: PreTrainedModel) -> None:
    found = perplexity(model, tiny_tokenizer(), TEXT, seqlen=32, limit=2, reference=model)
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1


def test_a_vocabulary_of_another_size_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="vocabulary of 300 and the reference one of 400"):
        perplexity(model, tiny_tokenizer(), TEXT, seqlen=32, limit=1, reference=tiny_model(vocab=400))


# --- what is recorded


def test_json(model: PreTrainedModel) -> None:
    always = {
        *("perplexity", "tokens", "windows", "seqlen", "bos", "dtype", "protocol", "data_sha256"),
        *("seconds", "tokens_per_second", "window_perplexities"),
    }
    found = perplexity(model, tiny_tokenizer(), TEXT, seqlen=32, limit=2).to_json()
    assert set(found) == always
    assert json.loads(json.dumps(found)) == found
    assert found["data_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert found["tokens_per_second"] == pytest.approx(64 / found["seconds"])
    assert set(perplexity(model, tiny_tokenizer(), TEXT, seqlen=32, limit=2, reference=model).to_json()) == {
        *always,
        *("kl", "top1_agreement"),
    }


def test_bfloat16_is_said_and_close(model: PreTrainedModel) -> None:
    half = tiny_model().eval()
    half.to(dtype=torch.bfloat16)
    found = perplexity(half, tiny_tokenizer(), TEXT, seqlen=64, limit=3)
    assert found.dtype == "bfloat16"
    assert found.perplexity == pytest.approx(perplexity(model, tiny_tokenizer(), TEXT, seqlen=64, limit=3).perplexity, rel=0.05)


def test_progress_is_told_after_each_batch(model: PreTrainedModel) -> None:
    told: list[tuple[int, int, float]] = []
    found = perplexity(model, tiny_tokenizer(), TEXT, seqlen=32, limit=5, batch_size=2, progress=lambda *news: told.append(news))
    assert [news[:2] for news in told] == [(2, 5), (4, 5), (5, 5)]
    assert told[-1][2] == pytest.approx(found.perplexity)


def test_a_long_text_draws_no_warning(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    perplexity(model, tiny_tokenizer(), TEXT, seqlen=32, limit=1)
    assert "longer than" not in caplog.text + capsys.readouterr().err


# --- amid training


def test_training_modes_come_back_and_dropout_is_off() -> None:
    model = tiny_model().train()
    model.model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    ids = cut(tiny_tokenizer()(TEXT)["input_ids"], 32)[:4]
    scores = evaluate_tokens(model, ids)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert scores.perplexity == pytest.approx(by_hand(model.eval(), ids), rel=1e-5)
    assert scores.tokens == 4 * 31
    assert scores.kl is None


def test_modes_come_back_after_an_error() -> None:
    model = tiny_model().train()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = math.nan
    with pytest.raises(CompressError, match="not finite"):
        evaluate_tokens(model, torch.zeros(1, 8, dtype=torch.int64))
    assert all(module.training for module in model.modules())


def test_a_step_of_training_can_follow() -> None:
    model = tiny_model().train()
    ids = cut(tiny_tokenizer()(TEXT)["input_ids"], 32)[:1]
    evaluate_tokens(model, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


# --- faults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 129}, "longer than the 128 positions of this model; use --seqlen 128"),
        ({"seqlen": 1}, "at least 2"),
        ({"seqlen": 32, "limit": 0}, "limit is 0"),
        ({"seqlen": 32, "batch_size": 0}, "batch size is 0"),
        ({"seqlen": 32, "bos": "every"}, "no BOS token"),
        ({"seqlen": 32, "bos": "maybe"}, "auto, none or every"),
        ({"seqlen": 32, "reference": "short"}, "longer than the 16 positions"),
    ],
)
def test_impossible_requests(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    if "reference" in options:
        options = {**options, "reference": tiny_model(positions=16)}
    with pytest.raises(UsageError, match=message):
        perplexity(model, tiny_tokenizer(), TEXT, **options)


def test_too_short_a_text_says_how_short(model: PreTrainedModel) -> None:
    tok = tiny_tokenizer()
    count = len(tok("the group of four")["input_ids"])
    with pytest.raises(UsageError, match=f"note has {count} tokens and one window needs 64"):
        perplexity(model, tok, EvalText.of("the group of four", "note"), seqlen=64)


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(UsageError, match="the tokenizer is not the model's"):
        perplexity(tiny_model(vocab=200), tiny_tokenizer(), TEXT, seqlen=32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_are_not_a_perplexity(value: float) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = value
    with pytest.raises(CompressError, match=r"output of the model is not finite .* in window 0") as caught:
        perplexity(broken, tiny_tokenizer(), TEXT, seqlen=32, limit=1)
    assert not isinstance(caught.value, UsageError)
    with pytest.raises(CompressError, match="divergence from the reference is not finite"):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=32, limit=1, reference=broken)


def test_a_token_masked_out_by_both_is_no_divergence() -> None:
    """log p = log q = -inf at a token gives 0, not NaN."""
    logits = torch.randn(4, VOCAB)
    logits[:, 7] = -math.inf
    sums = compress.evaluate._window_sums(logits, torch.tensor([1, 2, 3, 4]), logits.clone())
    assert sums[0] == pytest.approx(
        functional.cross_entropy(logits, torch.tensor([1, 2, 3, 4]), reduction="sum").item(), rel=1e-5
    )
    assert sums[1] == 0
    assert sums[2] == 4


# --- texts


def test_texts_by_name(tmp_path: Path) -> None:
    default = evaluation_text()
    assert default.label == "asset:wikitext2-test"
    assert default.sha256 == hashlib.sha256(asset_path("wikitext2-test").read_bytes()).hexdigest()
    raw = "\n one\r\n\n two "
    (tmp_path / "note").write_bytes(raw.encode())  # a name without suffix is plain text
    assert evaluation_text(str(tmp_path / "note")).text == raw
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    assert evaluation_text(str(tmp_path / "rows.jsonl")).text == "a\n\n\n\nb"


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text")),
        ("some/set", ("some/set", None, "test", "text")),
        ("some/set:en", ("some/set", "en", "test", "text")),
        ("some/set::validation:body", ("some/set", None, "validation", "body")),
    ],
)
def test_a_hub_text_is_its_rows_joined_by_blank_lines(
    monkeypatch: pytest.MonkeyPatch, spec: str, asked: tuple[str, str | None, str, str]
) -> None:
    import datasets

    dataset, config, split, field = asked

    def load(*args: Any, **kwargs: Any) -> Any:
        assert args == (dataset, config)
        assert kwargs["split"] == split
        return datasets.Dataset.from_dict({field: ["", " = T = \n", "x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert evaluation_text(spec).text == "\n\n = T = \n\n\nx"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("asset:wikitext2-tset", "did you mean 'asset:wikitext2-test'"),
        ("./none", "there is no file"),
        ("none.txt", "there is no file none.txt"),
        ("a:b:c:d:e", "is no text"),
        ("asset:tiny-llama", "is a model"),
    ],
)
def test_texts_that_are_none(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluation_text(spec)


def test_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UsageError, match="holds no text"):
        evaluation_text(str(tmp_path / "a.txt"))
