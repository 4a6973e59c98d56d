"""Compile Triton and Gluon kernels ahead of time for GPUs that are not there, and disassemble the result."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

CAPABILITIES = (80, 90, 100)


def compile_kernel(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    multiples_of_16: tuple[str, ...] = (),
    warps: int = 4,
) -> Any:
    """A compiled kernel, with `asm["ptx"]` text and `asm["cubin"]` bytes.

    types: of the arguments that are not i32, such as {"x": "*bf16"}; all pointers and `multiples_of_16` are on multiples of 16, as the
    launcher finds them to be for whole tensors.
    """
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    known = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in multiples_of_16]
    attributes = {(i,): [["tt.divisibility", 16]] for i in known}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def disassemble(cubin: bytes, folder: Path) -> str:
    """The machine code as text, by the disassembler in Triton's wheel."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
