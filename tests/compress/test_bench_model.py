"""Whole models timed against each other: what is counted, not how fast it was."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from compress.bench_model import model_timings
from compress.cli import app
from compress.errors import UsageError
from compress.export.packed24 import export_packed
from compress.export.source import open_source
from compress.models import load_model
from compress.weights import by_parameter, find_weights
from compress_kernels.native import native
from maskllm.patterns import Pattern
from maskllm.storage import load_masks, save_masks

P24 = Pattern(2, 4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """tiny-llama pruned by magnitude and packed."""
    parameters = by_parameter(find_weights(load_model("asset:tiny-llama").model))
    masks = {p.name: P24.best_of(p.refs[0].parameter.detach().abs()) for p in parameters}
    folder = tmp_path_factory.mktemp("packed")
    save_masks(folder / "mask.safetensors", masks, P24, {p.name: p.contracted_dim for p in parameters})
    out = folder / "model"
    export_packed(open_source("asset:tiny-llama"), out, masks=load_masks(folder / "mask.safetensors"))
    return str(out)


def test_packed_and_dense_take_turns_on_the_same_tokens(packed):
    rows = model_timings(["asset:tiny-llama", packed], ["bfloat16"], threads=1, prompt_tokens=8, new_tokens=4, turns=1)
    dense, sparse = rows[0], rows[-1]
    assert (dense.backend, sparse.backend) == ("dense", "2:4 bfloat16")
    if native("sparse24").library is not None:
        assert [row.backend for row in rows] == ["dense", "dense, control", "2:4 bfloat16"]
        assert rows[1].weight_bytes == dense.weight_bytes
    assert dense.prompt_tokens == sparse.prompt_tokens
    assert dense.new_tokens == sparse.new_tokens == 4
    assert dense.speedup_decode == 1
    assert sparse.speedup_decode == pytest.approx(sparse.decode_tokens_per_second / dense.decode_tokens_per_second)
    # 4.42 of 5.48 M weights take 9 bits instead of 16.
    assert sparse.weight_bytes < 0.7 * dense.weight_bytes
    assert torch.get_num_threads() > 0


def test_the_command(packed):
    arguments = ["bench", packed, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--threads", "1"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["timings"][0]["model"] == packed
    assert bool(found["gpu"]["reason"]) == (not torch.cuda.is_available())
    assert "decode tokens/s" in CliRunner().invoke(app, arguments).stdout


def test_what_cannot_be_timed_says_why():
    with pytest.raises(UsageError, match="no room"):
        model_timings(["asset:tiny-llama"], ["auto"], threads=1, prompt_tokens=200, new_tokens=200, turns=1)
    result = CliRunner().invoke(app, ["bench", "--shapes", "4096"])
    assert isinstance(result.exception, UsageError)
