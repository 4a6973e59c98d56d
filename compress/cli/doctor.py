"""`compress doctor`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def doctor(
    probe: Annotated[bool, typer.Option(help="Where there is a GPU, time 2:4 products of 4096 x 4096 on it.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine has and which kernels run on it.

    On a GPU the fastest implementation of the 2:4 product depends on the card and the shape, so some are timed: a minute or so the first
    time, when Triton compiles.

    **Examples**

    - `compress doctor`
    - `compress doctor --no-probe --json`
    """
    from compress.doctor import examine

    facts = examine(probe)
    if json_:
        typer.echo(json.dumps(facts))
        return
    from rich.markup import escape
    from rich.table import Table

    from compress.cli.tables import stdout

    table = Table("what", "found", show_header=False)
    for section in (_machine, _kernels, _gpu, _software):
        for name, found in section(facts):
            table.add_row(escape(name), escape(found))
        table.add_section()
    stdout().print(table)


def _machine(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory, compiler = facts["cpu"], facts["memory"], facts["compiler"]
    omp = f", OMP_NUM_THREADS={cpu['omp_num_threads']}" if cpu["omp_num_threads"] else ""
    threads = (
        f"{cpu['hardware_threads']} hardware threads, {cpu['usable_threads']} usable, torch uses {cpu['torch_threads']}{omp}"
    )
    return [
        ("system", f"{facts['system']['platform']}, Python {facts['system']['python']}"),
        ("processor", cpu["name"]),
        ("instruction sets", " ".join(cpu["instruction_sets"]) or "none of those the kernels use, or unknown"),
        (
            "bfloat16",
            "multiplied by instructions of its own"
            if cpu["bfloat16"]
            else "no instructions for it: float32 is the fast type here (recipes that leave it to the machine take it)",
        ),
        ("cores", f"{cpu['cores']} cores, {threads}" if cpu["cores"] else threads),
        ("memory", f"{_gib(memory['total'])}, {_gib(memory['available'])} available"),
        ("C++ compiler", f"{compiler['version']} ({compiler['path']})" if compiler else "none; kernels cannot be built here"),
    ]


def _kernels(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for kernel in facts["kernels"]:
        found = f"compiled, runs with {kernel['isa']}" if kernel["built"] else f"not there, torch does it: {kernel['reason']}"
        rows.append((f"kernel {kernel['name']}", found))
    for device, found in facts["sparse24"].items():
        rows.append((f"2:4 products on {device}", found["name"] + (f"; {found['reason']}" if found["reason"] else "")))
    return rows


def _gpu(facts: dict[str, Any]) -> list[tuple[str, str]]:
    gpu = facts["gpu"]
    rows = [
        (f"GPU {index}", f"{device['name']}, compute capability {device['compute_capability']}, {_gib(device['memory'])}")
        for index, device in enumerate(gpu["devices"])
    ]
    built = f"CUDA {gpu['torch_cuda']}" if gpu["torch_cuda"] else f"ROCm {gpu['torch_hip']}" if gpu["torch_hip"] else "no GPU"
    rows = rows or [("GPU", f"none that torch sees (this torch is built for {built})")]
    rows.append(("cuSPARSELt", str(gpu["cusparselt"] or "not available: torch has no 2:4 products on the GPU")))
    rows.append(("Triton", gpu["triton"] or "not installed: no Triton kernels"))
    chosen = facts["gpu_choices"]
    rows += [(f"2:4, {choice['case']}", choice["summary"]) for choice in chosen["choices"]]
    if chosen["reason"]:
        rows.append(("2:4 on the GPU", f"nothing chosen: {chosen['reason']}"))
    return rows


def _software(facts: dict[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {found or 'missing'}" for name, found in facts["packages"].items())
    rows = [("maskllm-compress", facts["tool"]), ("packages", versions)]
    for item in facts["optional"]:
        found = item["version"] or f"not installed ({item['install']})"
        rows.append((item["package"], f"{found}: {item['enables']}"))
    return rows


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
