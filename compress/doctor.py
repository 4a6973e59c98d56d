"""What this machine has, and what the tool can therefore do here. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import compress_kernels
from compress import __version__, bench_gpu
from compress.device import multiplies
from compress.errors import CompressError
from compress_kernels import sparse24
from compress_kernels.native import native

# Instruction sets that kernels here or in torch make use of, by their names in /proc/cpuinfo.
FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "datasets", "numpy", "scipy", "typer", "pydantic")


@dataclass(frozen=True)
class Extra:
    """A package that is not required: how to get it and what it adds."""

    package: str
    install: str
    enables: str
    version: str | None


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the instruction set that it uses here, or why it is not there."""

    name: str
    built: bool
    isa: str
    reason: str


def examine(probe: bool = True) -> dict[str, Any]:
    """Everything, as plain values for JSON.

    `tool`, `system`, `cpu`, `memory`, `compiler`, `kernels`, `sparse24` (what computes 2:4 products, by device), `gpu`, `gpu_choices`
    (which implementation is fastest for some of them there, or why that is not known), `packages`, `optional`. probe: time 2:4 products
    where there is a GPU.
    """
    return {
        "tool": __version__,
        "system": {"platform": platform.platform(), "python": platform.python_version()},
        "cpu": _cpu(),
        "memory": {"total": psutil.virtual_memory().total, "available": psutil.virtual_memory().available},
        "compiler": _compiler(),
        "kernels": [asdict(kernel) for kernel in kernels()],
        "sparse24": {device: sparse24.implementation(device)._asdict() for device in _devices()},
        "gpu": _gpu(),
        "gpu_choices": gpu_choices(probe),
        "packages": {name: version(name) for name in PACKAGES},
        "optional": [asdict(item) for item in extras()],
    }


def kernels() -> list[Kernel]:
    """All kernels that have C++ source in the package."""
    folders = sorted(source.parent.name for root in compress_kernels.__path__ for source in Path(root).glob("*/cpu.cpp"))
    found = [native(name) for name in folders]
    return [Kernel(kernel.name, kernel.library is not None, kernel.isa, kernel.reason) for kernel in found]


def gpu_choices(probe: bool) -> dict[str, Any]:
    """`choices`, those of `compress.bench_gpu.probe` as plain values with their words, and `reason`, which is empty when there are any."""
    reason, found = bench_gpu.unavailable(), []
    if not reason and not probe:
        reason = "not timed"
    if not reason:
        try:
            found = bench_gpu.probe()
        except CompressError as error:
            reason = str(error)
    return {"reason": reason, "choices": [asdict(choice) | {"case": choice.case, "summary": str(choice)} for choice in found]}


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def extras() -> list[Extra]:
    """Packages that add something, present or not."""
    listed = (
        ("gguf", "pip install 'maskllm-compress[gguf]'", "reading models from GGUF files"),
        ("torchvision", "pip install 'maskllm-compress[vision]'", "calibrating vision-language mixtures on images"),
        ("triton", "comes with torch for CUDA", "kernels on GPUs"),
        ("lm_eval", "pip install lm-eval", "benchmark tasks, on packed checkpoints too after `import compress.hf`"),
    )
    return [Extra(package, install, enables, version(package)) for package, install, enables in listed]


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, flags = platform.processor() or platform.machine(), set[str]()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                flags.update(value.split())
    return {
        "name": name,
        "instruction_sets": [flag for flag in FLAGS if flag in flags],
        "bfloat16": multiplies(torch.bfloat16, torch.device("cpu")),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": os.cpu_count(),
        "usable_threads": usable,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _compiler() -> dict[str, str] | None:
    """The C++ compiler that an installation would use."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(name.split()[0])
        if path is None:
            continue
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return {"path": path, "version": said.splitlines()[0] if said else ""}
    return None


def _gpu() -> dict[str, Any]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "compute_capability": capability, "memory": properties.total_memory})
    cusparselt = torch.backends.cusparselt
    return {
        "devices": found,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "cusparselt": cusparselt.version() if cusparselt.is_available() else None,
        "triton": version("triton"),
        "mps": torch.backends.mps.is_available(),
    }
