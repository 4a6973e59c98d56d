"""`compress doctor`: what it says of this machine, and of machines that lack things."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

import compress
import compress_kernels
from compress import doctor
from compress.cli import app
from compress_kernels import sparse24
from compress_kernels.native import Native, native


def facts() -> dict[str, Any]:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def table(*options: str) -> str:
    result = CliRunner().invoke(app, ["doctor", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_says_what_the_system_says() -> None:
    found = facts()
    assert found["tool"] == compress.__version__
    assert found["memory"]["total"] == psutil.virtual_memory().total
    assert found["cpu"]["hardware_threads"] == os.cpu_count()
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert found["packages"]["torch"] == torch.__version__
    assert found["gpu"]["torch_cuda"] == torch.version.cuda
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert all(name in flags for name in found["cpu"]["instruction_sets"])
        assert ("avx2" in found["cpu"]["instruction_sets"]) == ("avx2" in flags)


def test_every_kernel_is_there_with_its_instruction_set_or_its_reason() -> None:
    sources = [file.parent.name for root in compress_kernels.__path__ for file in Path(root).glob("*/cpu.cpp")]
    found = facts()["kernels"]
    assert sources
    assert sorted(kernel["name"] for kernel in found) == sorted(sources)
    for kernel in found:
        known = native(kernel["name"])
        assert kernel["built"] == (known.library is not None)
        assert (kernel["isa"], kernel["reason"]) == (known.isa, known.reason)
        assert f"kernel {kernel['name']}" in table()


def test_it_says_what_computes_2_4_products() -> None:
    found = sparse24.implementation("cpu")
    assert facts()["sparse24"]["cpu"] == {"name": found.name, "reason": found.reason}
    assert found.name in table()


def test_a_kernel_that_is_not_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "native", lambda name: Native(name, None, "it was not built: no C++ compiler"))
    shown = table()
    assert "not there, torch does it: it was not built: no C++ compiler" in shown
    assert {kernel["isa"] for kernel in facts()["kernels"]} == {"none"}


def test_a_gpu_is_shown_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Imaginary 9000", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 802)
    shown = table("--no-probe")
    assert "nothing chosen: not timed" in shown
    assert "Imaginary 9000, compute capability 9.0, 80.0 GiB" in shown
    assert "802" in shown


def test_a_bare_machine_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "version", lambda package: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = table()
    assert "none; kernels cannot be built here" in shown
    assert "none that torch sees" in shown
    assert "not installed (pip install 'maskllm-compress[gguf]'): reading models from GGUF files" in shown
    assert facts()["compiler"] is None


def test_a_compiler_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if command[0].endswith("good"):
            return SimpleNamespace(stdout="good compiler 1.0\nmore")
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/good" if name == "clang++" else "/bin/bad")
    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert facts()["compiler"] == {"path": "/bin/good", "version": "good compiler 1.0"}
