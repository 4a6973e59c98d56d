"""The measuring functions: which rows come out, how numbers follow from seconds, whose turn it is. No time is asserted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from compress import bench
from compress.errors import CompressError, UsageError
from compress_kernels.native import Native, native
from compress_kernels.sparse24 import pack

needs_kernel = pytest.mark.skipif(native("sparse24").library is None, reason=native("sparse24").reason)


@needs_kernel
def test_rows_of_every_variant() -> None:
    before = torch.get_num_threads()
    rows = list(bench.sparse24_timings([(12, 64)], [1, 32], threads=2, repetitions=3, rotated_bytes=1 << 12))
    assert torch.get_num_threads() == before
    variants = [(r.backend, r.dtype) for r in rows if r.batch == 1]
    assert variants[0] == ("torch", "bf16")
    assert set(variants[1:]) == {
        ("torch", "fp32"), ("dense control", "bf16"), ("2:4", "bf16"), ("2:4", "fp32"), ("2:4", "int8 a8"), ("2:4", "int8 a16"),
    }  # fmt: skip
    assert [(r.backend, r.dtype) for r in rows if r.batch == 32] == [v for v in variants if v[0] != "dense control"]
    sizes = {("torch", "bf16"): 1536, ("torch", "fp32"): 3072, ("2:4", "bf16"): 768 + 96, ("2:4", "int8 a8"): 384 + 96 + 48}
    for row in rows:
        assert (row.op, row.n, row.k, row.threads) == ("linear", 12, 64, 2)
        assert row.microseconds >= row.microseconds_p10 > 0
        if (row.backend, row.dtype) in sizes:
            assert row.gb_per_s * row.microseconds * 1e3 == pytest.approx(sizes[row.backend, row.dtype])
        base = next(r for r in rows if r.batch == row.batch)
        assert row.speedup_vs_torch_bf16 == pytest.approx(base.microseconds / row.microseconds)
        assert row.share_of_bandwidth / row.gb_per_s == pytest.approx(base.share_of_bandwidth / base.gb_per_s)


def test_variants_take_turns_and_rotate_their_copies() -> None:
    calls: list[tuple[str, int]] = []
    runs = [lambda i: calls.append(("a", i)), lambda i: calls.append(("b", i))]
    seconds = bench.interleaved(runs, [2, 3], 4)
    assert [len(s) for s in seconds] == [4, 4]
    assert calls[4:] == [("a", 0), ("b", 2), ("a", 1), ("b", 0), ("a", 0), ("b", 1), ("a", 1), ("b", 2)]


def test_random_weights_are_two_of_four() -> None:
    weight = bench.random_sparse24(8, 32)
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()
    pack(weight)


def test_what_cannot_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress_kernels.native.native", lambda name: Native(name, None, "it was not built"))
    with pytest.raises(CompressError, match="it was not built"):
        next(bench.sparse24_timings(threads=1))
    monkeypatch.undo()
    if native("sparse24").library is not None:
        with pytest.raises(UsageError, match="multiple of 4"):
            next(bench.sparse24_timings([(8, 6)], threads=1))


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, compress.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
