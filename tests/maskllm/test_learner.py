"""The training loop on a random Llama of two layers: reproducible, resumable to the bit, and it learns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from maskllm.checkpoint import CheckpointStore
from maskllm.errors import MaskError
from maskllm.gumbel import Schedule, prior_logits
from maskllm.learner import Learner
from maskllm.parametrization import MaskTarget
from maskllm.patterns import Pattern
from maskllm.settings import LearnSettings

PATTERN = Pattern(2, 4)
VOCAB = 64
BASE: dict[str, Any] = {
    "steps": 12,
    "batch": 4,
    "micro_batch": 2,
    "temperature": Schedule(2.0, 0.2),
    "scale": Schedule(100.0, 300.0),
    "learning_rate": 0.02,
    "regulariser": 0.0,
    "bf16": False,
}


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            pad_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def batches(step: int, size: int) -> Tensor:
    """The same tokens for the same step: sequences that count upwards by a stride."""
    draw = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (size, 1), generator=draw)
    return (start + torch.arange(16) * torch.randint(1, 4, (size, 1), generator=draw)) % VOCAB


def learner(folder: Path | None = None, mark: str = "here", **changes: Any) -> Learner:
    settings = LearnSettings(**{**BASE, **changes})
    model = network()
    targets = [
        MaskTarget(f"{name}.weight", module, "weight", -1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    prior = {t.name: PATTERN.best_of(t.module.weight.detach().abs()) for t in targets}
    logits = {
        name: prior_logits(mask, PATTERN, settings.parametrization, strength=3, std=0.01, noise=False)
        for name, mask in prior.items()
    }
    store = CheckpointStore(folder, {"run": mark}) if folder else None
    return Learner(model, targets, PATTERN, settings, logits, prior, Accelerator(cpu=True), store)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(run: Learner) -> dict[str, Tensor]:
    return {name: mask.logits.detach().clone() for name, mask in run.weights.items()}


def finish(run: Learner) -> list[float]:
    return [record.loss for record in run.steps(batches)]


@pytest.mark.parametrize("parametrization", ["patterns", "scores"])
def test_one_seed_gives_one_result_and_another_another(parametrization: str) -> None:
    first, second, other = (learner(parametrization=parametrization, seed=seed) for seed in (1, 1, 2))
    assert finish(first) == finish(second)
    finish(other)
    assert same(logits(first), logits(second))
    assert same(first.masks(), second.masks())
    assert not same(logits(first), logits(other))
    for mask in first.masks().values():
        PATTERN.index_of(mask)


@pytest.mark.parametrize("changes", [{}, {"kl_weight": 1.0, "regulariser": 1e-4, "warmup": 0.3}], ids=["plain", "distilled"])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = learner(**changes)
    expected = finish(whole)
    losses: list[float] = []
    for stop in (5, 6, 12):  # a fresh process each time, as far as the learner can tell
        run = learner(tmp_path, **changes)
        assert run.resume() == bool(losses)
        assert run.step == len(losses)
        for record in run.steps(batches):
            losses.append(record.loss)
            if record.step == stop:
                run.save()
                break
    assert losses == expected
    assert same(logits(run), logits(whole))


def test_a_checkpoint_of_no_step_at_all(tmp_path: Path) -> None:
    learner(tmp_path).save()
    run = learner(tmp_path)
    assert run.resume()
    assert run.step == 0
    whole = learner()
    assert finish(run) == finish(whole)
    assert same(logits(run), logits(whole))


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    learner(tmp_path).save()
    with pytest.raises(MaskError, match="its run is here, here it is there"):
        learner(tmp_path, mark="there").resume()


def test_step_zero_is_the_prior_and_learning_moves_away_from_it() -> None:
    run = learner()
    assert same(run.masks(), run.prior)
    assert all(flips == 0 for flips, _ in run.flipped().values())
    finish(run)
    now = run.masks()
    for name, (flips, groups) in run.flipped().items():
        differs = (now[name] != run.prior[name]).view(-1, 4).any(-1)
        assert (flips, groups) == (int(differs.sum()), differs.numel())
    assert sum(flips for flips, _ in run.flipped().values()) > 0


def test_the_loss_falls_and_so_does_that_of_the_final_mask() -> None:
    """On the text itself, measured with the hard masks before and after; with the distillation loss as the criterion."""
    # A random network predicts nothing, so what there is to learn is to follow its own dense predictions.
    run = learner(steps=60, batch=8, micro_batch=8, ce_weight=0.0, kl_weight=1.0, learning_rate=0.01)
    ids = torch.cat([batches(1000 + step, 8) for step in range(4)])
    with torch.no_grad(), run.state.using("dense"):
        dense = run.model(input_ids=ids).logits.log_softmax(-1)

    def divergence() -> float:
        with run.final():
            masked = run.model(input_ids=ids).logits.log_softmax(-1)
        return float((dense.exp() * (dense - masked)).sum(-1).mean())

    before = divergence()
    losses = finish(run)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert divergence() < 0.8 * before


def test_gradient_accumulation_is_one_large_batch_without_noise() -> None:
    """Whatever the micro-batch; with noise every micro-batch draws a mask of its own."""
    small, large = (learner(micro_batch=size, noise=False, steps=3) for size in (1, 4))
    for one, other in zip(small.steps(batches), large.steps(batches), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
    for name, value in logits(small).items():
        torch.testing.assert_close(value, logits(large)[name], atol=2e-3, rtol=0)


def test_records_and_rates() -> None:
    run = learner(steps=10, warmup=0.2, regulariser=1e-4)
    records = list(run.steps(batches))
    assert [record.step for record in records] == list(range(1, 11))
    assert [record.tokens for record in records] == [64 * step for step in range(1, 11)]
    assert records[0].temperature == 2.0
    assert records[5].temperature == pytest.approx(1.1)
    assert records[5].scale == pytest.approx(200)
    rates = [record.learning_rate for record in records]
    assert rates[0] == pytest.approx(0.02 / 3)
    assert rates[2] == pytest.approx(0.02)  # the peak, and from there down
    assert all(a > b > 0.1 * 0.02 for a, b in itertools.pairwise(rates[2:]))
    for record in records:
        assert record.loss == pytest.approx(record.cross_entropy - record.regulariser, rel=1e-5)
        assert record.regulariser > 0
    assert not list(run.steps(batches))


def test_the_regulariser_decays_linearly() -> None:
    """Equation 8 by hand; nothing else moves: no noise, no learning, temperature and scale constant."""
    fixed = {"temperature": Schedule(1.0, 1.0), "scale": Schedule(100.0, 100.0), "learning_rate": 0.0}
    run = learner(steps=4, noise=False, regulariser=1e-3, **fixed)
    run.state.tau, run.state.kappa = 1.0, 100.0
    with torch.no_grad():
        total = sum(float(getattr(t.module, t.parameter_name).square().sum()) for t in run.targets)
    found = [record.regulariser for record in run.steps(batches)]
    assert found == pytest.approx([1e-3 * share * total for share in (1, 0.75, 0.5, 0.25)], rel=1e-5)


def test_weights_are_untouched_throughout() -> None:
    before = network().state_dict()
    run = learner(kl_weight=0.5, bf16=True, steps=2)
    finish(run)
    run.close()
    after = run.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_batch_that_micro_batches_do_not_fill_is_refused() -> None:
    with pytest.raises(MaskError, match="batch 4 is not a multiple of micro_batch 3"):
        learner(micro_batch=3)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    run = learner()
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(MaskError, match="the loss is nan at step 0"):
        finish(run)
