"""The Triton soft mask without a GPU: in the interpreter against the reference, and compiled ahead of time."""

from __future__ import annotations

import os

import pytest
from interpreted import run_interpreted

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 leaves nothing to compile")

CANDIDATES = {(1, 4): 4, (2, 4): 6, (2, 8): 28, (4, 8): 70}
NUMBERS = {"kappa": "fp32", "tau": "fp32"}


def test_in_the_interpreter():
    run_interpreted("gumbel")


def constants(n: int, m: int, scores: bool, hard: bool, **more: bool) -> dict[str, object]:
    from compress_kernels.gumbel import triton as kernels

    count = CANDIDATES[n, m]
    padded = 1 << (count - 1).bit_length()
    switches = {"SCORES": scores, "NOISE": True, "HARD": hard, "NORM": True, **more}
    return {"C": count, "CP": padded, "M": m, "G": kernels.tile_groups(count, m), **switches}


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_every_target_and_with_logarithms_that_are_exact_next_to_one(capability):
    from triton_aot import compile_kernel

    from compress_kernels.gumbel import triton as kernels

    types = {"logits": "*fp32", "weight": "*bf16", "table": "*fp32", "out": "*bf16", "norms": "*fp32", **NUMBERS}
    asm = compile_kernel(kernels.forward_kernel, capability, types, constants(2, 4, False, False)).asm
    assert f".target sm_{capability}" in asm["ptx"]
    assert asm["cubin"][:4] == b"\x7fELF"
    # lg2.approx is off by 2^-22 near 1, where -log(u) is as small as 2^-24: large Gumbel numbers would be garbage, or infinite.
    assert "lg2.approx" not in asm["ptx"]
    backward = {**types, "grad": "*bf16", "grad_norm": "*fp32", "out": "*fp32"}
    asm = compile_kernel(kernels.backward_kernel, capability, backward, constants(2, 4, True, True, GRAD=True)).asm
    assert "lg2.approx" not in asm["ptx"]
    assert asm["cubin"][:4] == b"\x7fELF"


@compiled
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (4, 8)])
def test_compiles_for_every_pattern(n, m):
    from triton_aot import compile_kernel

    from compress_kernels.gumbel import triton as kernels

    types = {"logits": "*bf16", "weight": "*fp16", "table": "*fp32", "out": "*fp16", "norms": "*fp32", **NUMBERS}
    assert compile_kernel(kernels.forward_kernel, 90, types, constants(n, m, False, False)).asm["cubin"]
    backward = {**types, "grad": "*fp16", "grad_norm": "*fp32", "out": "*bf16"}
    assert compile_kernel(kernels.backward_kernel, 90, backward, constants(n, m, False, False, GRAD=True)).asm["cubin"]
