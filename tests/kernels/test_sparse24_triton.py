"""The Triton 2:4 kernels without a GPU: in the interpreter against the reference, and compiled ahead of time."""

from __future__ import annotations

import os

import pytest
from interpreted import run_interpreted

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 leaves nothing to compile")


def test_in_the_interpreter():
    run_interpreted("sparse24")


def compile_gemv(capability: int, w: str, x: str, batch: int, partial: bool):
    from triton_aot import compile_kernel

    from compress_kernels.sparse24 import triton as kernels

    config = kernels.CONFIGS[0]
    number = f"*{x}"
    types = {
        "x": "*i64",
        "values": "*i32" if w == "int8" else "*i64",
        "meta": "*u8",
        "scale": "*fp32",
        "bias": number,
        "out": number,
    }
    types["out"] = "*fp32" if partial else number
    shape = {"B": batch, "ROWS": config.rows, "STEP": 64 * config.warps}
    flags = {"X": x, "W": w, "HAS_SCALE": w == "int8", "HAS_BIAS": True, "PARTIAL": partial}
    return compile_kernel(kernels.gemv_kernel, capability, types, {**shape, **flags}, ("n", "k"), config.warps).asm


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("w", "x", "batch", "partial"), [("bf16", "bf16", 1, False), ("int8", "fp16", 3, True)])
def test_gemv_compiles_to_wide_loads_and_no_exchange_between_threads(capability, w, x, batch, partial):
    asm = compile_gemv(capability, w, x, batch, partial)
    assert f".target sm_{capability}" in asm["ptx"]
    assert asm["cubin"][:4] == b"\x7fELF"
    # Two words of each of four rows: 16 bytes of 16-bit values, 8 of int8.
    wide = "ld.global.v2.b32" if w == "int8" else "ld.global.v2.b64"
    assert asm["ptx"].count(wide) == 4
    assert "bar.sync" not in asm["ptx"]
    assert "st.shared" not in asm["ptx"]


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_reduce_and_unpack_compile(capability):
    from triton_aot import compile_kernel

    from compress_kernels.sparse24 import triton as kernels

    types = {"partial": "*fp32", "scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
    constants = {"HAS_SCALE": True, "HAS_BIAS": True, "BLOCK": 256}
    assert compile_kernel(kernels.reduce_kernel, capability, types, constants).asm["cubin"][:4] == b"\x7fELF"
    for w, word in (("bf16", "*i64"), ("int8", "*i32")):
        types = {"values": word, "meta": "*u8", "scale": "*fp32", "out": "*i64", "words": "i64"}
        asm = compile_kernel(kernels.unpack_kernel, capability, types, {"W": w, "BF16": True, "STEP": 512}).asm
        assert asm["cubin"][:4] == b"\x7fELF"
