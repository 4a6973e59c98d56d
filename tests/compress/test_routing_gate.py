"""Gates on tiny models of every architecture: what they compute, what they save, and what they leave alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_configs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import CompressError, UsageError
from compress.models import fingerprint
from compress.routing import gate as gates
from compress.routing import rules
from compress.routing.calibrate import rule_decisions
from compress.routing.decisions import Decision, make_decision
from compress.routing.gate import Routing, attach, routing_of
from compress.routing.mixtures import Mixture, Seen, observe
from compress.routing.storage import frozen

K = 3
BUILD: dict[str, Any] = {
    name: (lambda build=build: build(num_experts_per_tok=K))
    for name, build in tiny_configs.BUILDERS.items()
    if name in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
}
RENORMALISES = {
    "mixtral": True,
    "olmoe": False,
    "qwen2_moe": False,
    "qwen3_moe": False,
    "deepseek_v2": False,
    "deepseek_v3": True,
    "gpt_oss": True,
}
TOKENS = tiny_configs.tokens(batch=2, length=12)


class FirstExpert(torch.nn.Module):
    """A decision that differs from token to token: by the number of its first expert, 1, 2 or 3 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unused", torch.zeros(()))

    def forward(self, hidden: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        return 1 + experts[:, 0] % K


def first_expert(mixtures: list[Mixture]) -> dict[str, Any]:
    return {mixture.name: FirstExpert() for mixture in mixtures}


@contextmanager
def masked_by_hand(model: Any, mixtures: list[Mixture]) -> Iterator[None]:
    """What gates with `FirstExpert` should compute, by multiplying routing weights slot by slot and running every expert."""

    def before(mixture: Mixture) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, index, weights = args
            changed = weights.clone()
            for t in range(len(weights)):
                order = sorted(range(K), key=lambda j: (-float(weights[t, j]), j))
                kept = order[: 1 + int(index[t, order[0]]) % K]
                for j in range(K):
                    changed[t, j] = weights[t, j] if j in kept else 0
                if RENORMALISES[name_of(model)]:
                    changed[t] *= weights[t].sum() / changed[t].sum()
            return hidden, index, changed

        return hook

    handles = [m.module.register_forward_pre_hook(before(m)) for m in mixtures]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def name_of(model: Any) -> str:
    return model.config.model_type


class Products(TorchDispatchMode):
    """Multiplications in float32 matrix products; of a grouped one only the rows that its offsets reach."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if name in ("aten::mm", "aten::bmm", "aten::addmm"):
            a, b = args[-2:]
            if a.dtype == torch.float32:
                self.count += a.numel() * b.shape[-1]
        elif "grouped_mm" in name:
            offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
            self.count += int(offsets[-1]) * args[1].shape[-1] * args[1].shape[-2]
        return func(*args, **kwargs)


def products(model: Any, ids: torch.Tensor) -> int:
    with torch.no_grad(), Products() as counted:
        model(ids, use_cache=False)
    return counted.count


def run(model: Any, ids: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


PATHS = ["eager", "grouped_mm", "batched_mm", "grouped_mm sentinel"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("architecture", sorted(BUILD))
def test_dropped_slots_change_the_result_as_they_should_and_cost_nothing(
    architecture: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BUILD[architecture]()
    dispatch = path.split()[0]
    if path.endswith("sentinel"):  # the way it goes on a GPU
        monkeypatch.setattr(gates, "_host_sees", lambda tensor: False)
    model.set_experts_implementation(dispatch)
    mixtures, _ = observe(model, [TOKENS])
    assert {m.renormalise for m in mixtures} == {RENORMALISES[architecture]}
    with masked_by_hand(model, mixtures):
        expected = run(model)
    plain, every = run(model), products(model, TOKENS)

    routing = attach(model, mixtures, first_expert(mixtures), "test")
    with routing.counting() as counts:
        found = run(model)
    assert (found - plain).abs().max() > 1e-3
    assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert all(int(count.sum()) == TOKENS.numel() and int(count[0]) == 0 for count in counts.values())
    saved = 0
    for m in mixtures:
        slot = sum(p.shape[1] * p.shape[2] for p in m.module.parameters() if p.dim() == 3)
        saved += slot * int((counts[m.name] * torch.arange(K, -1, -1)).sum())
    assert saved > 0
    assert every - products(model, TOKENS) == saved
    routing.detach()
    assert torch.equal(run(model), plain)
    assert products(model, TOKENS) == every


@pytest.mark.parametrize("architecture", sorted(BUILD))
def test_decoding_one_token_runs_only_its_experts(architecture: str) -> None:
    model = BUILD[architecture]()
    model.set_experts_implementation("eager")
    mixtures, _ = observe(model, [TOKENS])
    ids = TOKENS[:1, :1]
    with masked_by_hand(model, mixtures):
        expected = run(model, ids)
    attach(model, mixtures, first_expert(mixtures), "test")
    assert torch.allclose(run(model, ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("architecture", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_a_new_router_prunes_nothing_bit_for_bit(architecture: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BUILD[architecture]()
    model.set_experts_implementation(path.split()[0])
    before, plain = fingerprint(model), run(model)
    mixtures, _ = observe(model, [TOKENS])
    if path.endswith("sentinel"):
        monkeypatch.setattr(gates, "_host_sees", lambda tensor: False)
    routing = attach(model, mixtures, {m.name: frozen(make_decision("otp", m)) for m in mixtures}, "otp")
    assert torch.equal(run(model), plain)
    assert fingerprint(model) == before
    assert not any("compress" in name or "decision" in name for name in model.state_dict())
    with routing.counting() as counts:
        run(model)
    assert all(int(count[K]) == TOKENS.numel() for count in counts.values())


def test_decisions_are_the_same_every_time_and_in_any_batch() -> None:
    model = BUILD["olmoe"]()
    mixtures, seen = observe(model, [TOKENS])
    routing = attach(model, mixtures, random_routers(mixtures, seen), "otp")

    def kept(ids: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        with routing.counting():
            for g in routing.gates:
                decision = g.decision
                handle = decision.register_forward_hook(lambda m, a, out: found.append(out))
                run(model, ids)
                handle.remove()
        return found

    both = kept(TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(both, kept(TOKENS), strict=True))
    for row in range(2):
        alone = kept(TOKENS[row : row + 1])
        assert all(torch.equal(a, b.view(2, -1)[row]) for a, b in zip(alone, both, strict=True))
    assert len(torch.cat(both).unique()) > 1


def random_routers(mixtures: list[Mixture], seen: dict[str, Seen]) -> dict[str, Decision]:
    decisions: dict[str, Decision] = {}
    for m in mixtures:
        router: Any = make_decision("otp", m)
        router.standardise(seen[m.name].hidden, seen[m.name].weights)
        with torch.no_grad():
            router.read.normal_(generator=torch.Generator().manual_seed(3))
            router.bias.zero_()
        decisions[m.name] = frozen(router)
    return decisions


def test_a_generation_with_a_cache_is_that_without_one() -> None:
    model = BUILD["qwen3_moe"]()
    mixtures, seen = observe(model, [TOKENS])
    attach(model, mixtures, random_routers(mixtures, seen), "otp")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(TOKENS[:1], **options), model.generate(TOKENS[:1], use_cache=False, **options))


def test_shared_experts_always_run() -> None:
    model = BUILD["qwen2_moe"]()
    mixtures, seen = observe(model, [TOKENS])
    ran = []
    for name, module in model.named_modules():
        if name.endswith("shared_expert"):
            module.register_forward_hook(lambda m, a, out: ran.append(out.reshape(-1, out.shape[-1]).shape[0]))
    attach(model, mixtures, rule_decisions("top-k", mixtures, seen, 1), "top-k")
    run(model)
    assert ran == [TOKENS.numel()] * 2


def test_odp_protects_the_most_important_tokens() -> None:
    model = BUILD["mixtral"]()
    model.set_experts_implementation("eager")
    mixtures, seen = observe(model, [TOKENS])
    decisions = rule_decisions("top-k", mixtures, seen, 1)
    routing = attach(model, mixtures, decisions, "odp", protect=0.25)
    assert model.config._attn_implementation == "eager"
    attention: list[torch.Tensor] = []
    block: Any = mixtures[0].block
    seen_index: list[torch.Tensor] = []
    handles = [
        block.self_attn.register_forward_hook(lambda m, a, out: attention.append(out[1])),
        mixtures[0].module.register_forward_pre_hook(lambda m, a: seen_index.append(a[1])),  # behind the gate
    ]
    with routing.counting() as counts:
        run(model)
    for handle in handles:
        handle.remove()
    length = TOKENS.shape[1]
    assert all(count.tolist() == [0, 2 * (length - 3), 0, 2 * 3] for count in counts.values())
    state = attention[0].float()  # [2, heads, L, L]
    received = torch.stack([state[..., j:, j].mean(1).mean(-1) for j in range(length)], -1)
    important = rules.importance(hidden_of(mixtures[0], model), received).argsort(-1, descending=True)[:, :3]
    whole = (seen_index[0] < mixtures[0].experts).sum(-1).view(2, length) == K
    assert torch.equal(whole.nonzero()[:, 1].view(2, 3), important.sort(-1).values)


def hidden_of(mixture: Mixture, model: Any) -> torch.Tensor:
    """What enters the first mixture; no gate changes it."""
    caught: list[torch.Tensor] = []
    handle = mixture.module.register_forward_pre_hook(lambda m, a: caught.append(a[0]), prepend=True)
    run(model)
    handle.remove()
    return caught[0].view(*TOKENS.shape, -1)


def test_protection_without_attention_weights_is_refused() -> None:
    model = BUILD["mixtral"]()
    mixtures, seen = observe(model, [TOKENS])
    attach(model, mixtures, rule_decisions("odp", mixtures, seen, None), "odp", protect=0.25)
    model.set_attn_implementation("sdpa")
    with pytest.raises(CompressError, match="attn_implementation='eager'"):
        run(model)


def test_models_that_cannot_be_routed_are_refused() -> None:
    with pytest.raises(UsageError, match="dense model"):
        observe(tiny_configs.llama(), [TOKENS])
    with pytest.raises(UsageError, match="Llama4TextExperts"):
        observe(tiny_configs.llama4(), [TOKENS])
    with pytest.raises(UsageError, match="one expert a token"):
        observe(tiny_configs.mixtral(num_experts_per_tok=1), [TOKENS])
    model = BUILD["olmoe"]()
    mixtures, _ = observe(model, [TOKENS])
    attach(model, mixtures, first_expert(mixtures), "test")
    with pytest.raises(UsageError, match="routing already"):
        attach(model, mixtures, first_expert(mixtures), "test")


def test_the_eager_loop_of_gpt_oss_is_refused_where_slots_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BUILD["gpt_oss"]()
    mixtures, _ = observe(model, [TOKENS])
    attach(model, mixtures, first_expert(mixtures), "test")
    monkeypatch.setattr(gates, "_host_sees", lambda tensor: False)
    model.set_experts_implementation("eager")
    with pytest.raises(UsageError, match="grouped_mm"):
        run(model)
    model.set_experts_implementation("grouped_mm")
    run(model)


def test_a_copy_of_a_routed_model_has_a_routing_of_its_own() -> None:
    model = BUILD["olmoe"]()
    mixtures, _ = observe(model, [TOKENS])
    attach(model, mixtures, first_expert(mixtures), "test")
    routed, other = run(model), copy.deepcopy(model)
    own = routing_of(other)
    assert isinstance(own, Routing)
    assert own.model is other
    own.detach()
    assert torch.equal(run(model), routed)
    assert not torch.equal(run(other), routed)


def test_bfloat16_weights_stay_bfloat16() -> None:
    model = BUILD["mixtral"]().to(torch.bfloat16)
    mixtures, seen = observe(model, [TOKENS])
    assert all(m.renormalise for m in mixtures)
    attach(model, mixtures, rule_decisions("top-k", mixtures, seen, 2), "top-k")
    assert run(model).dtype == torch.bfloat16
