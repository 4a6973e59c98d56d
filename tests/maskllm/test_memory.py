"""The settings of the learner that save memory: what they must not change, and that they save it."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import maskllm.head
from maskllm.checkpoint import CheckpointStore
from maskllm.errors import MaskError
from maskllm.gumbel import Schedule, prior_logits
from maskllm.head import find_head, head_loss, without_head
from maskllm.learner import Learner
from maskllm.objective import token_loss
from maskllm.parametrization import MaskTarget
from maskllm.patterns import Pattern
from maskllm.recompute import checkpoint_blocks
from maskllm.settings import LearnSettings

PATTERN = Pattern(2, 4)
VOCAB = 64
LEAN: dict[str, Any] = {"state": "8bit", "step_in_backward": True, "clip_by": "weight", "checkpoint_activations": True}
BASE: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "micro_batch": 4,
    "parametrization": "scores",
    "temperature": Schedule(2.0, 0.2),
    "scale": Schedule(100.0, 300.0),
    "learning_rate": 0.02,
    "regulariser": 1e-4,
    "kl_weight": 0.5,
    "bf16": False,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "attention_dropout": 0.5,  # evaluation mode must stay, recomputed or not
}


def llama() -> Any:
    return drawn(LlamaForCausalLM(LlamaConfig(**SIZES)))


def mixtral() -> Any:
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    return drawn(MixtralForCausalLM(config))


def drawn(model: Any) -> Any:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=draw)
    return model.eval()


def batches(step: int, size: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (size, 1), generator=draw)
    return (start + torch.arange(16) * torch.randint(1, 4, (size, 1), generator=draw)) % VOCAB


def targets_of(model: nn.Module) -> list[MaskTarget]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            found.append(MaskTarget(f"{name}.weight", module, "weight", -1))
        found += [MaskTarget(f"{name}.{n}", module, n, -1) for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
    return found


def learner(folder: Path | None = None, build: Callable[[], Any] = llama, **changes: Any) -> Learner:
    settings = LearnSettings(**{**BASE, **changes})
    model = build()
    targets = targets_of(model)
    prior = {t.name: PATTERN.best_of(getattr(t.module, t.parameter_name).detach().abs()) for t in targets}
    logits = {
        name: prior_logits(mask, PATTERN, settings.parametrization, strength=3, std=0.01, noise=False)
        for name, mask in prior.items()
    }
    store = CheckpointStore(folder, {"run": "one"}) if folder else None
    return Learner(
        model, targets, PATTERN, settings, logits, prior, Accelerator(cpu=True), store, blocks=list(model.model.layers)
    )


def everything(run: Learner) -> dict[str, Tensor]:
    """All that a run has learned and remembers."""
    found = {}
    for name, mask in run.weights.items():
        found[name] = mask.logits.detach().clone()
        found |= {f"{key}/{name}": value.clone() for key, value in run.updates.optimizer.moments(mask.logits).items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finish(run: Learner) -> list[Any]:
    return list(run.steps(batches))


def gradients(run: Learner) -> dict[str, Tensor]:
    loss, _ = run.losses(batches(0, 4), 1e-4)
    run.backward(loss)
    return {name: mask.logits.grad for name, mask in run.weights.items() if mask.logits.grad is not None}


# --- activation checkpointing


@pytest.mark.parametrize("build", [llama, mixtral])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_of_recomputed_blocks_are_bitwise_those_of_kept_ones(build: Any, noise: bool, bf16: bool) -> None:
    kept = gradients(learner(build=build, noise=noise, bf16=bf16))
    recomputed = gradients(learner(build=build, noise=noise, bf16=bf16, checkpoint_activations=True))
    assert len(kept) == len(targets_of(build()))
    assert same(kept, recomputed)
    assert all(g.abs().sum() > 0 for g in kept.values())


def test_a_whole_run_is_the_same_with_recomputed_blocks() -> None:
    kept, recomputed = learner(noise=True), learner(noise=True, checkpoint_activations=True)
    assert [r.loss for r in finish(kept)] == [r.loss for r in finish(recomputed)]
    assert same(everything(kept), everything(recomputed))
    with kept.final(), recomputed.final():
        ids = batches(99, 2)
        assert torch.equal(kept.model(input_ids=ids).logits, recomputed.model(input_ids=ids).logits)


class MaskedWeightsAlive(TorchDispatchMode):
    """The most masked weights that are alive at once, in elements: tensors of a type that only they have."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.most = sizes, 0
        self.alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16 and tensor.numel() in self.sizes:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), tensor.numel())
        self.alive = {key: (ref, n) for key, (ref, n) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(n for _, n in self.alive.values()))
        return out


def test_only_one_block_of_masked_weights_is_alive() -> None:
    """Every masked weight has an odd size of its own, so that its tensors are told from all others."""
    counts = {}
    for recomputed in (False, True):
        run = learner(bf16=True, kl_weight=0.0, ce_weight=1.0, checkpoint_activations=recomputed)
        sizes = {getattr(t.module, t.parameter_name).numel() for t in run.targets}
        with MaskedWeightsAlive(sizes) as watch:
            loss, _ = run.losses(batches(0, 1)[:, :5], 0.0)
            gc.collect()
            run.backward(loss)
        counts[recomputed] = watch.most
    whole = sum(mask.logits.numel() for mask in learner().weights.values())
    assert counts[False] >= whole
    assert counts[True] <= 1.5 * whole / 3  # of three blocks


def test_blocks_come_back_as_they_were() -> None:
    model = llama()
    before = [vars(layer).get("forward") for layer in model.model.layers]
    layer = model.model.layers[0]
    plain = layer.forward
    layer.forward = lambda *a, **k: plain(*a, **k)  # as accelerate replaces it
    own = layer.forward
    ids = batches(0, 2)
    expected = model(input_ids=ids).logits
    blocks = [*model.model.layers, layer]  # one twice
    release = checkpoint_blocks(blocks)
    assert torch.equal(model(input_ids=ids).logits, expected)
    release()
    assert vars(layer)["forward"] is own
    assert [vars(one).get("forward") for one in model.model.layers[1:]] == before[1:]


# --- the step in the backward pass


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("clip", [0.0, 0.001])
@pytest.mark.parametrize("build", [llama, mixtral])
def test_a_step_in_the_backward_pass_is_bitwise_the_step_after_it(state: str, clip: float, build: Any) -> None:
    options = {"state": state, "clip": clip, "clip_by": "weight", "noise": True, "steps": 3, "build": build}
    after, within = learner(**options), learner(**options, step_in_backward=True)
    for a, b in zip(finish(after), finish(within), strict=True):
        assert (a.loss, a.gradient_norm) == (b.loss, b.gradient_norm)
    assert same(everything(after), everything(within))


def test_no_two_gradients_exist_at_once() -> None:
    run = learner(step_in_backward=True, clip_by="weight")
    alive: list[int] = []
    for mask in run.weights.values():
        mask.logits.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(m.logits.grad is not None for m in run.weights.values()))
        )
    gradients(run)
    assert alive == [0] * len(run.weights)


@pytest.mark.parametrize("changes", [{}, LEAN, {"state": "8bit", "micro_batch": 1}], ids=["standard", "lean", "summed"])
def test_a_closed_learner_leaves_no_tensor(changes: dict[str, Any]) -> None:
    """Neither logits nor moments, though the model lives on."""
    run = learner(steps=1, **changes)
    finish(run)
    model = run.model
    first = next(iter(run.weights.values())).logits
    left = [weakref.ref(first), *(weakref.ref(t) for t in run.updates.optimizer.moments(first).values())]
    run.close()
    del run, first
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
    assert not [name for name, _ in model.named_parameters() if "logits" in name]


def test_clipping_by_weight_is_clipping_to_its_share() -> None:
    run = learner(clip=1e-3, clip_by="weight", state="float32")
    found = gradients(run)
    total = sum(g.numel() for g in found.values())
    expected = {name: g * min(1.0, 1e-3 * (g.numel() / total) ** 0.5 / float(g.norm())) for name, g in found.items()}
    run.updates.finish()
    for name, mask in run.weights.items():
        torch.testing.assert_close(
            run.updates.optimizer.moments(mask.logits)["exp_avg"], 0.1 * expected[name], rtol=1e-3, atol=1e-12
        )


# --- narrow states


def test_narrow_states_learn_as_float32_does() -> None:
    """Distillation of a random network, which has something to learn; the divergence of the final mask, of text like the training text."""
    ids = torch.cat([batches(1000 + step, 8) for step in range(4)])
    options: dict[str, Any] = {
        "steps": 30, "batch": 8, "micro_batch": 8, "ce_weight": 0.0, "kl_weight": 1.0, "learning_rate": 0.01, "regulariser": 0.0,
    }  # fmt: skip

    def divergence(run: Learner) -> float:
        with torch.no_grad(), run.state.using("dense"):
            dense = run.model(input_ids=ids).logits.log_softmax(-1)
        with run.final():
            masked = run.model(input_ids=ids).logits.log_softmax(-1)
        return float((dense.exp() * (dense - masked)).sum(-1).mean())

    before = divergence(learner(**options))
    gained = {}
    for state in ("float32", "bfloat16", "8bit"):
        run = learner(**options, state=state)
        finish(run)
        gained[state] = before - divergence(run)
    assert gained["float32"] > 0.2 * before
    assert gained["bfloat16"] > 0.85 * gained["float32"]
    assert gained["8bit"] > 0.85 * gained["float32"]


@pytest.mark.parametrize("state", ["bfloat16", "8bit"])
def test_gradients_of_micro_batches_are_summed_in_bfloat16(state: str) -> None:
    run = learner(state=state, micro_batch=1, noise=False, steps=2)
    exact = learner(micro_batch=1, noise=False, steps=2)
    for a, b in zip(finish(run), finish(exact), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=2e-2)
    assert not run.updates._sums


@pytest.mark.parametrize(
    "changes",
    [LEAN, {**LEAN, "state": "bfloat16"}, {"state": "8bit", "micro_batch": 1}, {"step_in_backward": True, "clip": 0.0}],
    ids=["8bit", "bfloat16", "summed", "float32"],
)
def test_an_interrupted_lean_run_ends_in_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = learner(noise=True, **changes)
    expected = [record.loss for record in finish(whole)]
    losses: list[float] = []
    for stop in (2, 3, 6):
        run = learner(tmp_path, noise=True, **changes)
        assert run.resume() == bool(losses)
        for record in run.steps(batches):
            losses.append(record.loss)
            if record.step == stop:
                run.save()
                break
    assert losses == expected
    assert same(everything(run), everything(whole))


@pytest.mark.parametrize(("saved", "wanted"), list(itertools.permutations(["float32", "bfloat16", "8bit"], 2)))
def test_a_checkpoint_of_another_state_is_refused(tmp_path: Path, saved: str, wanted: str) -> None:
    learner(tmp_path, state=saved).save()
    with pytest.raises(MaskError, match="state"):
        learner(tmp_path, state=wanted).resume()
    assert learner(tmp_path, state=saved).resume()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_in_backward": True, "clip_by": "weight", "micro_batch": 2}, "set micro_batch to 4"),
        ({"step_in_backward": True}, "clip_by to weight"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        learner(**changes)


def test_recomputing_needs_blocks() -> None:
    settings = LearnSettings(**{**BASE, "checkpoint_activations": True})
    with pytest.raises(MaskError, match="needs the blocks"):
        Learner(llama(), [], PATTERN, settings, {}, {}, Accelerator(cpu=True))


# --- the loss through the head


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("ce", "kl"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_loss_through_the_head_is_that_of_its_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, ce: float, kl: float
) -> None:
    monkeypatch.setattr(maskllm.head, "CHUNK", rows * VOCAB)
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(32, VOCAB).requires_grad_(False)
    ids = torch.randint(VOCAB, (3, 11), generator=draw)
    hidden = [torch.randn(3, 11, 32, generator=draw) for _ in range(2)]
    results = []
    for through in (False, True):
        student = hidden[0].clone().requires_grad_()
        if through:
            loss, *parts = head_loss(student, hidden[1], head, torch.float32, ids, ce_weight=ce, kl_weight=kl)
        else:
            loss, *parts = token_loss(head(student), head(hidden[1]), ids, ce_weight=ce, kl_weight=kl)
        (grad,) = torch.autograd.grad(loss * 3, student)
        results.append((loss.detach(), *parts, grad))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_network_that_does_more_to_its_logits_gets_them_whole() -> None:
    """Scaled after the head, as some models do: the loss must be that of the scaled logits."""

    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    run = learner(build=lambda: drawn(Scaled(LlamaConfig(**SIZES))), noise=False)
    ids = batches(0, 4)
    loss, _ = run.losses(ids, 0.0)
    assert run._head is None
    with torch.no_grad(), run.state.using("dense"):
        teacher = run.model(input_ids=ids).logits
    with torch.no_grad():
        expected, *_ = token_loss(run.model(input_ids=ids).logits, teacher, ids, ce_weight=1.0, kl_weight=0.5)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_a_head_that_is_masked_or_absent_is_not_taken_apart() -> None:
    assert find_head(nn.Linear(4, 4)) is None
    model = llama().requires_grad_(False)
    assert find_head(model) is model.lm_head
    model.lm_head.weight.requires_grad_(True)
    assert find_head(model) is None
    with without_head(model.lm_head) as entered:
        hidden = torch.randn(1, 2, 32)
        assert model.lm_head(hidden) is hidden
    assert entered[0] is hidden
    assert model.lm_head(hidden).shape == (1, 2, VOCAB)
