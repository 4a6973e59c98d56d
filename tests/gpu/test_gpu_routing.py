"""Routing on a GPU: dropped slots by transformers' mark for experts of another process, decisions as on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "compress"))
import tiny_configs

from compress.errors import UsageError
from compress.routing.decisions import Decision, make_decision
from compress.routing.gate import attach
from compress.routing.mixtures import observe
from compress.routing.storage import frozen

K = 3
TOKENS = tiny_configs.tokens(batch=2, length=12)


def routed(architecture: str, dispatch: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits unpruned and routed, on the CPU."""
    model = tiny_configs.BUILDERS[architecture](num_experts_per_tok=K)
    mixtures, seen = observe(model, [TOKENS])
    decisions: dict[str, Decision] = {}
    for m in mixtures:
        router: Any = make_decision("otp", m, rank=4)
        router.standardise(seen[m.name].hidden, seen[m.name].weights)
        with torch.no_grad():
            router.read.normal_(generator=torch.Generator().manual_seed(3))
            router.bias.zero_()
        decisions[m.name] = frozen(router)
    model.set_experts_implementation(dispatch)
    model.to(device)
    with torch.no_grad():
        plain = model(TOKENS.to(device)).logits.cpu()
        attach(model, mixtures, decisions, "otp")
        return plain, model(TOKENS.to(device)).logits.cpu()


@pytest.mark.parametrize("dispatch", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_a_gpu_skips_what_the_cpu_skips(architecture: str, dispatch: str) -> None:
    _, expected = routed(architecture, "eager", "cpu")
    plain, found = routed(architecture, dispatch, "cuda")
    assert torch.allclose(found, expected, atol=2e-3, rtol=2e-3)
    assert (found - plain).abs().max() > 1e-2


def test_gpt_oss_runs_grouped_and_is_refused_in_the_eager_loop() -> None:
    _, expected = routed("gpt_oss", "grouped_mm", "cpu")
    assert torch.allclose(routed("gpt_oss", "grouped_mm", "cuda")[1], expected, atol=2e-3, rtol=2e-3)
    with pytest.raises(UsageError, match="grouped_mm"):
        routed("gpt_oss", "eager", "cuda")
