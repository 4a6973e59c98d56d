"""scripts/benchmarks/llamacpp.py: what its processes do when they are told to generate. llama.cpp itself is a stand-in here."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packed_fixtures import make_case

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "llamacpp.py"
OPTIONS = argparse.Namespace(threads=1, prompt_tokens=3, new_tokens=4)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llamacpp_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class Llama:
    """The most likely token is one more than the last one."""

    made: list[Llama]

    def __init__(self, path: str, **settings: Any) -> None:
        self.settings, self.seen, self.ctx = settings, [], self
        Llama.made.append(self)

    def n_vocab(self) -> int:
        return 16

    def reset(self) -> None:
        self.seen.append([])

    def eval(self, tokens: list[int]) -> None:
        self.seen[-1].append(tokens)

    def logits(self) -> Any:
        scores = (ctypes.c_float * 16)()
        scores[self.seen[-1][-1][-1] + 1] = 1.0
        return ctypes.cast(scores, ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_reads_the_prompt_once_and_decodes_greedily(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Llama.made = []
    library = SimpleNamespace(
        Llama=Llama,
        __version__="1",
        llama_print_system_info=lambda: b"AVX2 = 1",
        llama_get_logits_ith=lambda context, i: context.logits(),
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setattr(sys, "stdin", io.StringIO("[1, 5, 7]\n[2, 2, 9]\n"))
    (tmp_path / "model.gguf").write_bytes(b"12345")
    answers = io.StringIO()
    script.serve_llama(str(tmp_path / "model.gguf"), OPTIONS, answers)
    ready, *rates = map(json.loads, answers.getvalue().splitlines())
    assert ready == {"bytes": 5, "version": "1", "features": "AVX2 = 1"}
    assert all(prefill > 0 and decode > 0 for prefill, decode in rates)
    (llama,) = Llama.made
    assert llama.seen == [[[1, 5, 7], [8], [9], [10]], [[2, 2, 9], [10], [11], [12]]]
    assert llama.settings["n_threads"] == llama.settings["n_threads_batch"] == 1
    assert llama.settings["n_ctx"] >= 3 + 4
    assert llama.settings["n_gpu_layers"] == 0


def test_a_process_of_ours_generates_when_it_is_told_to(script: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from compress.assets import asset_path

    make_case(tmp_path, "llama", vocab_size=5000).pack(tmp_path / "packed")
    AutoTokenizer.from_pretrained(asset_path("tiny-llama")).save_pretrained(tmp_path / "packed")
    worker = script.Worker(sys.executable, "compress", tmp_path / "packed", OPTIONS)
    assert worker.ready["weights"] == "2:4 float32"
    assert worker.ready["bytes"] > 0
    for tokens in ([5, 6, 7], [9, 8, 7]):
        prefill, decode = worker.generate(tokens)
        assert prefill > 0
        assert decode > 0
    worker.close()


def test_a_process_that_ends_is_told_of(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with status 1"):
        script.Worker(sys.executable, "llama", tmp_path / "nothing", OPTIONS)  # not installed, or no such file


def test_a_format_that_cannot_be_made_is_told_of(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="made no Q8_0 of"):
        script.quantize(sys.executable, tmp_path / "nothing.gguf", tmp_path / "out.gguf", "Q8_0")
