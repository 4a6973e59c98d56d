"""Blocks that stay in the host's memory. The accelerator is played by torch's meta device, which has shapes and no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_configs import BUILDERS, tokens
from torch import nn
from transformers import masking_utils

import compress.calibrate
import compress.session
from compress.calibrate import walk_blocks
from compress.experts import count_tokens, count_tokens_walking
from compress.hosted import HostedBlocks
from compress.recipe import LearnMaskRecipe
from compress.session import prepare
from compress.structure import decoder_blocks
from compress.weights import find_weights

META = torch.device("meta")


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral"])
def test_a_block_is_on_the_device_while_it_runs_and_only_then(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: None)  # looks at values
    model = BUILDERS[kind]().to(torch.bfloat16)  # torch knows the shapes of grouped products in this type alone
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = [block.module for block in decoder_blocks(model)]
    hosted = HostedBlocks(model, META)
    seen: list[list[set[str]]] = []
    for block in blocks:
        first = next(m for m in block.modules() if not list(m.children()))
        first.register_forward_pre_hook(lambda *_: seen.append([devices(b) for b in blocks]))
    assert model(input_ids=tokens().to(META), use_cache=False).logits.device == META
    assert seen == [[{"meta"}, {"cpu"}], [{"cpu"}, {"meta"}]]
    for name, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, before[name])
    assert [devices(block) for block in blocks] == [{"cpu"}, {"cpu"}]
    assert model.get_input_embeddings().weight.is_meta
    hosted.close()
    assert not any("forward" in vars(block) for block in blocks)


def test_a_block_that_fails_comes_back() -> None:
    model = BUILDERS["llama"]()
    HostedBlocks(model, META)
    block = decoder_blocks(model)[0].module
    with pytest.raises(TypeError):
        block()
    assert devices(block) == {"cpu"}


def test_a_walk_holds_a_block_where_the_hidden_states_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is measured and while the caller alters it."""
    model = BUILDERS["llama"]()
    inside: list[tuple[nn.Module, torch.device]] = []

    @contextmanager
    def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
        inside.append((module, device))
        yield
        inside.pop()

    monkeypatch.setattr(compress.calibrate, "placed", placed)
    for block, _ in walk_blocks(model, find_weights(model), [tokens()], gram=False):
        assert inside == [(block.module, torch.device("cpu"))]
    assert not inside


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_tokens_are_counted_block_by_block_as_in_the_whole(kind: str) -> None:
    model = BUILDERS[kind]()
    refs, batches = find_weights(model), [tokens(seed=seed) for seed in range(2)]
    expected = count_tokens(model, refs, batches)
    assert sum(expected.values()) > 0
    assert count_tokens_walking(model, refs, batches) == expected


def recipe() -> LearnMaskRecipe:
    raw: dict[str, Any] = {
        "model": {"source": "asset:tiny-llama"},
        "data": {"sources": [{"path": "asset:wikitext2-valid", "span": [0, 0.2]}], "seqlen": 32},
        "calibration": {"samples": 2},
        "learn": {"steps": 1, "batch": 2, "shard": "weights", "checkpoint_activations": True},
    }
    return LearnMaskRecipe.model_validate(raw)


def test_a_session_leaves_the_blocks_on_the_host_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(recipe(), host_blocks=True).hosted is None  # on CPUs there is nothing to leave
    monkeypatch.setattr(compress.session, "pick_device", lambda _: META)
    session = prepare(recipe(), host_blocks=True)
    assert session.hosted is not None
    assert all(ref.parameter.device.type == "cpu" for ref in session.refs)
    assert session.loaded.model.device == META
