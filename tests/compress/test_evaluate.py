"""Perplexity and divergence against straightforward computations written out here."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from text_fixtures import VOCAB, prose, tiny_model, tiny_tokenizer
from torch import Tensor, nn

import compress.evaluate
from compress.assets import asset_path
from compress.errors import CompressError, UsageError
from compress.evaluate import EvalText, TokenScores, evaluate_tokens, evaluation_text, perplexity, token_windows

TEXT = prose(600)


def plain_perplexity(model: Any, ids: list[int], seqlen: int, limit: int | None = None) -> float:
    """As GPTQ's script does it: the mean cross-entropy of each window, times its length, over all."""
    model.eval()
    count = min(limit or len(ids), len(ids) // seqlen)
    nlls = []
    for i in range(count):
        window = torch.tensor(ids[i * seqlen : (i + 1) * seqlen])[None]
        with torch.no_grad():
            logits = model(window).logits
        loss = nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), window[:, 1:].reshape(-1))
        nlls.append(loss.double() * seqlen)
    return math.exp(torch.stack(nlls).sum() / (count * seqlen))


def plain_divergence(model: Any, reference: Any, windows: Tensor) -> tuple[float, float]:
    """KL(reference || model) and equal choices, one probability at a time."""
    model.eval(), reference.eval()
    divergences, equal = [], []
    for window in windows:
        with torch.no_grad():
            q, p = (m(window[None]).logits[0, :-1].double().softmax(-1).tolist() for m in (model, reference))
        for p_row, q_row in zip(p, q, strict=True):
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p_row, q_row, strict=True) if a > 0))
            equal.append(max(range(len(p_row)), key=p_row.__getitem__) == max(range(len(q_row)), key=q_row.__getitem__))
    return sum(divergences) / len(divergences), sum(equal) / len(equal)


# --- perplexity


@pytest.mark.parametrize(("seqlen", "batch_size", "limit"), [(2, 8, None), (16, 1, None), (33, 4, 7), (64, 3, 2)])
def test_it_is_the_perplexity_of_the_literature(seqlen: int, batch_size: int, limit: int | None) -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    ids = tok(TEXT, verbose=False)["input_ids"]
    found = perplexity(model, tok, TEXT, seqlen=seqlen, limit=limit, batch_size=batch_size)
    assert found.perplexity == pytest.approx(plain_perplexity(model, ids, seqlen, limit), rel=1e-5)
    assert found.windows == min(limit or 10**9, len(ids) // seqlen)
    assert found.tokens == found.windows * (seqlen - 1)
    for i in (0, found.windows - 1):
        window = ids[i * seqlen : (i + 1) * seqlen]
        assert found.window_perplexities[i] == pytest.approx(plain_perplexity(model, window, seqlen), rel=1e-5)
    assert len(found.window_perplexities) == found.windows


def test_an_embedded_model_on_wikitext2() -> None:
    """The real thing, small: weights of a file, its tokenizer, the text that the papers score."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = asset_path("tiny-llama")
    model, tok = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    text = asset_path("wikitext2-test").read_bytes().decode()
    found = perplexity(model, tok, evaluation_text(), seqlen=256, limit=4)
    assert found.perplexity == pytest.approx(plain_perplexity(model, tok(text, verbose=False)["input_ids"], 256, 4), rel=1e-6)
    assert 5 < found.perplexity < 500  # trained: far below the 4,096 of a uniform guess


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_model()
    nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, tiny_tokenizer(), TEXT, seqlen=32)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-5)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, tok = tiny_model(0), tiny_model(1), tiny_tokenizer()
    whole = perplexity(model, tok, TEXT, seqlen=50, limit=5, reference=reference)
    monkeypatch.setattr(compress.evaluate, "_CHUNK_ELEMENTS", 7 * VOCAB)
    parts = perplexity(model, tok, TEXT, seqlen=50, limit=5, reference=reference)
    assert parts.window_perplexities == pytest.approx(whole.window_perplexities, rel=1e-6)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.top1_agreement == whole.top1_agreement


def test_half_precision_is_scored_in_fp32() -> None:
    model, tok = tiny_model().to(torch.bfloat16), tiny_tokenizer()
    found = perplexity(model, tok, TEXT, seqlen=32)
    assert found.dtype == "bfloat16"
    assert found.perplexity == pytest.approx(plain_perplexity(model, tok(TEXT, verbose=False)["input_ids"], 32), rel=1e-5)


# --- BOS


def test_bos_auto_without_and_with_a_tokenizer_that_adds_it() -> None:
    model, plain = tiny_model(), tiny_tokenizer(bos=True)
    assert perplexity(model, plain, TEXT, seqlen=32).bos == "none"
    adding = tiny_tokenizer(adds_bos=True)
    ids = adding(TEXT, verbose=False)["input_ids"]
    assert ids[0] == adding.bos_token_id
    found = perplexity(model, adding, TEXT, seqlen=32)
    assert found.bos == "once"
    assert found.perplexity == pytest.approx(plain_perplexity(model, ids, 32), rel=1e-5)
    none = perplexity(model, adding, TEXT, seqlen=32, bos="none")
    assert none.bos == "none"
    assert none.perplexity == pytest.approx(plain_perplexity(model, ids[1:], 32), rel=1e-5)


def test_an_eos_behind_the_text_is_not_taken_for_a_bos() -> None:
    _, stated = token_windows(tiny_tokenizer(bos=True, adds_eos=True), EvalText.of(TEXT), 32, "auto")
    assert stated == "none"
    _, stated = token_windows(tiny_tokenizer(adds_bos=True, adds_eos=True), EvalText.of(TEXT), 32, "auto")
    assert stated == "once"


def test_bos_every_window_is_given_and_not_predicted() -> None:
    model, tok = tiny_model(), tiny_tokenizer(adds_bos=True)
    ids = tok(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    found = perplexity(model, tok, TEXT, seqlen=32, bos="every")
    assert found.bos == "every window"
    assert found.windows == len(ids) // 31
    assert found.tokens == found.windows * 31  # every token of the text in a window is predicted
    windows = [[tok.bos_token_id, *ids[i * 31 : (i + 1) * 31]] for i in range(found.windows)]
    assert found.perplexity == pytest.approx(plain_perplexity(model, sum(windows, []), 32), rel=1e-5)
    assert "BOS given and not predicted" in found.protocol


def test_bos_every_needs_a_bos() -> None:
    with pytest.raises(UsageError, match="no BOS token"):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=32, bos="every")
    with pytest.raises(UsageError, match="auto, none or every"):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=32, bos="sometimes")  # type: ignore[arg-type]


# --- the result


def test_what_a_result_states() -> None:
    calls: list[tuple[int, int, float]] = []
    tok = tiny_tokenizer()
    found = perplexity(
        tiny_model(), tok, EvalText.of(TEXT, "prose"), seqlen=32, limit=5, batch_size=2, progress=lambda *call: calls.append(call)
    )
    assert found.data_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (found.seqlen, found.windows, found.dtype) == (32, 5, "float32")
    assert found.seconds > 0
    assert found.tokens_per_second == pytest.approx(5 * 32 / found.seconds)
    assert [(done, total) for done, total, _ in calls] == [(2, 5), (4, 5), (5, 5)]
    assert calls[-1][2] == pytest.approx(found.perplexity)
    for said in ("gptq-windows", "no special token added", "first 5 non-overlapping windows of 32 tokens", "31 predicted tokens"):
        assert said in found.protocol


KEYS = {
    *("perplexity", "tokens", "windows", "seqlen", "bos", "dtype", "protocol", "data_sha256"),
    *("seconds", "tokens_per_second", "window_perplexities"),
}


def test_json() -> None:
    alone = perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=32, limit=2).to_json()
    assert set(alone) == KEYS
    assert json.loads(json.dumps(alone)) == alone
    compared = perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=32, limit=2, reference=tiny_model(1)).to_json()
    assert set(compared) == KEYS | {"kl", "top1_agreement"}


def test_the_default_window_is_2048_or_what_the_model_has() -> None:
    tok = tiny_tokenizer()
    assert perplexity(tiny_model(positions=128), tok, TEXT).seqlen == 128
    assert perplexity(tiny_model(positions=128), tok, TEXT, reference=tiny_model(positions=64)).seqlen == 64
    assert perplexity(tiny_model(positions=4096), tok, prose(6000), limit=1).seqlen == 2048


def test_no_warning_about_the_length(capfd: pytest.CaptureFixture[str]) -> None:
    perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=128, limit=1)
    captured = capfd.readouterr()
    assert "longer than" not in captured.err + captured.out


# --- reference


def test_divergence_against_a_brute_force() -> None:
    model, reference, tok = tiny_model(0), tiny_model(1), tiny_tokenizer()
    windows, _ = token_windows(tok, EvalText.of(TEXT), 24, "auto")
    kl, agreement = plain_divergence(model, reference, windows[:4])
    found = perplexity(model, tok, TEXT, seqlen=24, limit=4, batch_size=3, reference=reference)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.top1_agreement == agreement
    other_way, _ = plain_divergence(reference, model, windows[:4])
    assert found.kl != pytest.approx(other_way, rel=1e-3)  # the direction is KL(reference || model)


def test_partial_agreement_is_a_share() -> None:
    reference, tok = tiny_model(0), tiny_tokenizer()
    model = tiny_model(0)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.5)
    windows, _ = token_windows(tok, EvalText.of(TEXT), 24, "auto")
    _, agreement = plain_divergence(model, reference, windows[:4])
    assert 0.1 < agreement < 0.99
    assert perplexity(model, tok, TEXT, seqlen=24, limit=4, reference=reference).top1_agreement == pytest.approx(agreement)


def test_a_model_is_no_distance_from_itself() -> None:
    model = tiny_model()
    found = perplexity(model, tiny_tokenizer(), TEXT, seqlen=32, limit=3, reference=model)
    assert found.kl == 0
    assert found.top1_agreement == 1


def test_a_reference_may_exclude_a_token_that_the_model_excludes() -> None:
    """p = 0 contributes 0 to the divergence, whatever log q is."""

    def exclude(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(-1, torch.tensor([VOCAB - 1]), -math.inf)

    model, reference = tiny_model(0), tiny_model(1)
    for each in (model, reference):
        each.lm_head.register_forward_hook(exclude)
    found = evaluate_tokens(model, torch.arange(64).view(2, 32), reference=reference)
    assert found.kl is not None
    assert 0 < found.kl < math.inf


def test_the_reference_must_share_the_vocabulary() -> None:
    with pytest.raises(UsageError, match="vocabulary of 300 and the reference one of 304"):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=32, reference=tiny_model(vocab=304))


# --- faults


def test_a_text_shorter_than_a_window_says_both_counts() -> None:
    tok = tiny_tokenizer()
    count = len(tok(prose(20))["input_ids"])
    with pytest.raises(UsageError, match=f"prose has {count} tokens and one window needs 128"):
        perplexity(tiny_model(), tok, EvalText.of(prose(20), "prose"), seqlen=128)


def test_a_window_longer_than_the_model() -> None:
    with pytest.raises(UsageError, match="129 tokens are longer than the 128 positions"):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=129)
    with pytest.raises(UsageError, match="longer than the 64 positions"):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=128, reference=tiny_model(positions=64))


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(UsageError, match="the tokenizer is not the model's"):
        perplexity(tiny_model(vocab=64), tiny_tokenizer(), TEXT, seqlen=32)


def test_an_output_that_is_not_finite() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[3] = math.nan
    with pytest.raises(CompressError, match="output of the model is not finite .* window 0") as caught:
        perplexity(broken, tiny_tokenizer(), TEXT, seqlen=32)
    assert not isinstance(caught.value, UsageError)
    with pytest.raises(CompressError, match="divergence from the reference is not finite"):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, seqlen=32, reference=broken)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"seqlen": 1}, "at least 2"), ({"limit": 0}, "at least 1"), ({"batch_size": 0}, "at least 1")]
)
def test_impossible_numbers(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(tiny_model(), tiny_tokenizer(), TEXT, **{"seqlen": 32, **wrong})


# --- amid training


def test_evaluate_tokens_scores_the_same_windows() -> None:
    model, reference, tok = tiny_model(0), tiny_model(1), tiny_tokenizer()
    windows, _ = token_windows(tok, EvalText.of(TEXT), 32, "auto")
    scores = evaluate_tokens(model, windows[:5], batch_size=2, reference=reference)
    whole = perplexity(model, tok, TEXT, seqlen=32, limit=5, reference=reference)
    assert scores.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert (scores.tokens, len(scores.window_nlls)) == (5 * 31, 5)
    assert scores.nll == pytest.approx(sum(scores.window_nlls) / 5)
    assert (scores.kl, scores.top1_agreement) == (pytest.approx(whole.kl, rel=1e-5), whole.top1_agreement)


def test_every_module_gets_its_mode_back_and_training_goes_on() -> None:
    model = tiny_model().train()
    model.model.layers[0].self_attn.eval()  # a part that is frozen in evaluation mode
    before = [module.training for module in model.modules()]
    ids = torch.arange(64).view(2, 32)
    first, second = evaluate_tokens(model, ids), evaluate_tokens(model, ids)
    assert first == second
    assert [module.training for module in model.modules()] == before
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_dropout_is_off_in_the_model_and_the_reference() -> None:
    model, reference = tiny_model(0).train(), tiny_model(1).train()
    ids = torch.arange(64).view(2, 32)
    trained = evaluate_tokens(model, ids, reference=reference)
    assert trained == evaluate_tokens(model.eval(), ids, reference=reference.eval())


def test_modes_come_back_after_an_error() -> None:
    model = tiny_model().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(CompressError):
        evaluate_tokens(model, torch.arange(64).view(2, 32))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("shape", [(0, 8), (8,), (3, 1)])
def test_windows_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"\[windows, seqlen\]"):
        evaluate_tokens(tiny_model(), torch.zeros(shape, dtype=torch.int64))


def test_a_hopeless_score_is_infinite_not_an_overflow() -> None:
    assert TokenScores(nll=1e4, tokens=1, window_nlls=[1e4]).perplexity == math.inf


# --- texts


def test_the_default_text_is_the_embedded_wikitext2() -> None:
    text = evaluation_text()
    raw = asset_path("wikitext2-test").read_bytes()
    assert text.text.encode() == raw
    assert text.sha256 == hashlib.sha256(raw).hexdigest()
    assert text == evaluation_text("asset:wikitext2-test")


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    raw = "\r\n a \n\n – b\n".encode()
    for name in ("a.txt", "no_suffix", "notes.md"):
        (tmp_path / name).write_bytes(raw)
        text = evaluation_text(str(tmp_path / name))
        assert text.text.encode() == raw
        assert (text.label, text.sha256) == (str(tmp_path / name), hashlib.sha256(raw).hexdigest())


def test_the_records_of_a_file_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n"}\n{"text": ""}\n{"text": "two"}\n')
    assert evaluation_text(str(tmp_path / "a.jsonl")).text == "one\n\n\n\n\ntwo"


@pytest.mark.parametrize(
    ("spec", "args", "split", "field", "label"),
    [
        (
            "wikitext",
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            "test",
            "text",
            "Salesforce/wikitext:wikitext-2-raw-v1:test:text",
        ),
        ("org/set", ("org/set", None), "test", "text", "org/set:test:text"),
        ("org/set:en", ("org/set", "en"), "test", "text", "org/set:en:test:text"),
        ("org/set::dev:body", ("org/set", None), "dev", "body", "org/set:dev:body"),
    ],
)
def test_hub_texts(monkeypatch: pytest.MonkeyPatch, spec: str, args: tuple[str, Any], split: str, field: str, label: str) -> None:
    import datasets

    asked: list[Any] = []

    def load(*got: Any, **kwargs: Any) -> Any:
        asked.append((got, kwargs))
        return datasets.Dataset.from_dict({field: ["", " = Title = \n", "", " text \n"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = evaluation_text(spec)
    assert asked == [(args, {"split": split, "streaming": False})]
    assert text.text == "\n\n = Title = \n\n\n\n\n text \n"
    assert text.label == label


def test_a_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert evaluation_text(str(tmp_path / "set")).text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.txt", "there is no file missing.txt"),
        ("/nowhere/data", "there is no file /nowhere/data"),
        ("a:b:c:d:e", "is no text"),
        ("asset:wikitext", "asset:wikitext2"),
        ("asset:tiny-moe", "is a model, not a text"),
    ],
)
def test_texts_that_are_not_there(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluation_text(spec)


def test_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UsageError, match="holds no text"):
        evaluation_text(str(tmp_path / "a.txt"))
