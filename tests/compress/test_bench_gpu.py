"""What `compress bench` and `compress doctor` tell of the choices on a GPU, with candidates and times that stand for one."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from typer.testing import CliRunner

from compress import bench_gpu
from compress.cli import app
from compress.errors import CompressError, UsageError
from compress_kernels.native import Native
from compress_kernels.sparse24 import cuda, reference
from compress_kernels.sparse24.backends import Backend, Case

TIMES = {"gemv 1x4": 9.0, "gemv 4x4": 4.0, "cusparselt": 1.0, "dense": 10.0, "unpack": 30.0}


class Gpu:
    """CPU tensors take the way of those on a GPU, whose implementations take the times that are given; cuSPARSELt fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, self.probed, self.broken = dict(TIMES), [], ""
        self._last = ""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(bench_gpu, "DEVICE", "cpu")
        monkeypatch.setattr(bench_gpu.sparse24, "linear", lambda x, packed: cuda.linear(x, *packed))
        monkeypatch.setattr(cuda, "_choices", {})
        monkeypatch.setattr(cuda, "_fits", lambda backend, case: True)
        monkeypatch.setattr(cuda, "candidates", self._candidates)
        monkeypatch.setattr(cuda, "measure", lambda call, device: self.times[call() is not None and self._last])

    def _candidates(self, case: Case) -> list[Backend]:
        def backend(name: str) -> Backend:
            def run(x, packed, bias, state):
                self._last = name
                if name in ("cusparselt", self.broken):
                    raise RuntimeError("this card [sm_12] is not supported")
                return reference.linear(x, packed, bias)

            return Backend(name, lambda case: True, run)

        self.probed.append((case.n, case.k, case.bucket, case.value_dtype))
        return [backend(name) for name in self.times]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_a_choice_says_what_won_by_how_much_and_what_failed(gpu: Gpu) -> None:
    (choice,) = bench_gpu.probe([(8, 16)], [3])
    assert (choice.device, choice.n, choice.k, choice.tokens) == ("cpu", 8, 16, 4)
    assert (choice.activations, choice.values, choice.backend) == ("bfloat16", "bfloat16", "gemv 4x4")
    assert list(choice.microseconds.items()) == [("gemv 4x4", 4.0), ("gemv 1x4", 9.0), ("dense", 10.0), ("unpack", 30.0)]
    assert choice.failures == {"cusparselt": "RuntimeError: this card [sm_12] is not supported"}
    assert choice.speedup_vs_dense == 2.5
    assert choice.case == "8 x 16, 3 to 4 tokens, bfloat16"
    assert str(choice) == (
        "gemv 4x4, 4.0 µs, 2.50 x dense; dense 10.0; unpack 30.0; "
        "cusparselt failed (RuntimeError: this card [sm_12] is not supported)"
    )


def test_dense_wins_where_it_is_faster(gpu: Gpu) -> None:
    gpu.times["dense"] = 2.0
    (choice,) = bench_gpu.probe([(8, 16)], [1], torch.int8)
    assert (choice.backend, choice.speedup_vs_dense) == ("dense", 1)
    assert choice.case == "8 x 16, 1 token, int8 times bfloat16"
    assert str(choice).startswith("dense, 2.0 µs; gemv 4x4 4.0;")
    del gpu.times["dense"]
    assert bench_gpu.probe([(12, 16)], [2])[-1].speedup_vs_dense is None
    assert bench_gpu.choices()[-1].case == "12 x 16, 2 tokens, bfloat16"


def test_doctor_probes_and_shows_every_shape(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu.probe, "__defaults__", (((8, 16),), (1, 16), torch.bfloat16))
    shown = CliRunner().invoke(app, ["doctor"]).stdout
    assert "2:4, 8 x 16, 9 to 16 tokens, bfloat16" in shown
    assert "gemv 4x4, 4.0 µs, 2.50 x dense" in shown
    assert "this card [sm_12] is not supported" in shown
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["gpu_choices"]
    assert found["reason"] == ""
    assert [choice["tokens"] for choice in found["choices"]] == [1, 16]
    cuda.forget()
    gpu.probed.clear()
    found = json.loads(CliRunner().invoke(app, ["doctor", "--no-probe", "--json"]).stdout)["gpu_choices"]
    assert found == {"reason": "not timed", "choices": []}
    assert gpu.probed == []


def test_doctor_survives_a_gpu_that_computes_nothing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu.probe, "__defaults__", (((8, 16),), (1,), torch.bfloat16))
    gpu.broken = "unpack"
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0
    assert "nothing chosen: the GPU did not compute a 2:4 product of 8 x 16: the dense product of" in shown.stdout


def test_bench_shows_the_choices_for_the_shapes_asked_for(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress_kernels.native.native", lambda name: Native(name, None, "it was not built"))
    arguments = ["bench", "--shapes", "8x16,12x16", "--batches", "1,4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "12 x 16, 3 to 4 tokens, bfloat16" in result.stdout
    assert "gemv 4x4, 4.0 µs, 2.50 x dense" in result.stdout
    assert gpu.probed[0] == (8, 16, 1, torch.bfloat16)
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["timings"] == []
    assert [(row["n"], row["tokens"], row["backend"]) for row in found["gpu"]["choices"]] == [
        (8, 1, "gemv 4x4"), (8, 4, "gemv 4x4"), (12, 1, "gemv 4x4"), (12, 4, "gemv 4x4"),
    ]  # fmt: skip


def test_without_a_gpu_the_reason_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.choices() == []
    with pytest.raises(CompressError, match="nothing to time on a GPU: torch sees no GPU"):
        bench_gpu.probe([(8, 16)], [1])
    assert "nothing chosen: torch sees no GPU" in CliRunner().invoke(app, ["doctor"]).stdout
    monkeypatch.setattr("compress_kernels.native.native", lambda name: Native(name, None, "it was not built"))
    with pytest.raises(CompressError, match="it was not built"):
        CliRunner().invoke(app, ["bench", "--shapes", "8x16"], catch_exceptions=False)


def test_a_gpu_whose_kernels_do_not_load_says_so(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the GPU kernels do not load: no module named x"
    monkeypatch.setattr(bench_gpu.sparse24, "_cuda", lambda: (None, reason))
    assert bench_gpu.unavailable() == reason
    assert f"nothing chosen: {reason}" in CliRunner().invoke(app, ["doctor"]).stdout


def test_widths_that_4_does_not_divide_are_refused(gpu: Gpu) -> None:
    with pytest.raises(UsageError, match="multiple of 4"):
        bench_gpu.probe([(8, 6)], [1])
