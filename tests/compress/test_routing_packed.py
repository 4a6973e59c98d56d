"""Routing of packed checkpoints: skipped, learned on and loaded as on dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
from accelerate import Accelerator
from packed_fixtures import make_case
from transformers import AutoModelForCausalLM

import compress.hf  # noqa: F401
from compress.export.routing import export_routing
from compress.models import load_model
from compress.recipe_routing import RoutingLearnSection
from compress.routing.calibrate import rule_decisions
from compress.routing.decisions import Decision, make_decision
from compress.routing.gate import attach, routing_of
from compress.routing.learn import RoutingLearner
from compress.routing.mixtures import observe
from compress.routing.storage import save
from compress.runtime import _PackedExperts

K = 3
TOKENS = tiny_configs.tokens(batch=2, length=10)


@pytest.fixture(scope="module", params=["mixtral", "olmoe", "gpt_oss"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_case(folder, request.param, num_experts_per_tok=K).pack(folder / "packed")
    return folder / "packed"


def logits(model: Any, ids: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_packed_experts_multiply_only_the_tokens_that_run_them(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(packed), tokenizer=False).model
    mixtures, seen = observe(model, [TOKENS])
    assert all(isinstance(m.module, _PackedExperts) for m in mixtures)
    rows: list[int] = []
    real = _PackedExperts._expert
    monkeypatch.setattr(_PackedExperts, "_expert", lambda self, index, x: (rows.append(len(x)), real(self, index, x))[1])
    plain = logits(model)
    assert sum(rows) == 2 * K * TOKENS.numel()
    attach(model, mixtures, rule_decisions("top-k", mixtures, seen, 1), "top-k")
    rows.clear()
    routed = logits(model)
    assert sum(rows) == 2 * TOKENS.numel()
    assert not torch.allclose(routed, plain, atol=1e-3)


def test_routers_learn_on_packed_weights(packed: Path) -> None:
    model = load_model(str(packed), tokenizer=False).model
    mixtures, _ = observe(model, [TOKENS])
    routers: dict[str, Decision] = {m.name: make_decision("otp", m, rank=4) for m in mixtures}
    before = {name: value.clone() for name, router in routers.items() for name, value in router.state_dict(prefix=name).items()}
    routing = attach(model, mixtures, routers, "otp")
    settings = RoutingLearnSection(steps=3, batch=2, micro_batch=2, precision="fp32")
    learner = RoutingLearner(model, routing, settings, 0.7, Accelerator(cpu=True))
    records = list(learner.steps(lambda step, size: tiny_configs.tokens(batch=size, length=10, seed=step)))
    assert all(record.gradient_norm > 0 for record in records)
    after = {name: value for name, router in routers.items() for name, value in router.state_dict(prefix=name).items()}
    assert all(not torch.equal(after[f"{m.name}read"], before[f"{m.name}read"]) for m in mixtures)


def test_a_packed_folder_with_a_routing_loads_with_from_pretrained(packed: Path, tmp_path: Path) -> None:
    model = load_model(str(packed), tokenizer=False).model
    mixtures, seen = observe(model, [TOKENS])
    routing = attach(model, mixtures, rule_decisions("top-k", mixtures, seen, 2), "top-k")
    save(tmp_path / "run", routing, {"model": str(packed)})
    export_routing(tmp_path / "run", tmp_path / "routed")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "routed")
    assert routing_of(loaded) is not None
    assert torch.equal(logits(loaded), logits(model))
