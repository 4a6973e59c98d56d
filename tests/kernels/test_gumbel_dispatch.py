"""Which implementation of the soft mask computes what, that it says so, and the C++ source under sanitizers."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from gumbel_cases import BOTH, COMPILER, KEY, PATTERNS, case, close, need_kernel, numbers
from torch import Tensor

import compress_kernels
from compress_kernels import gumbel
from compress_kernels.gumbel import Draw, cpu, implementation, reference, using
from maskllm.gumbel import Parametrization, logit_width, soft_masked_weight
from maskllm.patterns import Pattern


@pytest.mark.parametrize("shape", [(6, 40), (3, 5, 16)])
@pytest.mark.parametrize("parametrization", BOTH)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_soft_masked_weight_takes_the_kernel(
    pattern: Pattern, parametrization: Parametrization, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_kernel()
    weight = numbers(*shape, seed=1)
    start = numbers(*shape[:-1], shape[-1] // pattern.m, logit_width(pattern, parametrization)) * 0.02
    results = []
    for name in ("torch", "fastest"):
        logits = start.clone().requires_grad_()
        with using(name), monkeypatch.context() as patch:  # type: ignore[arg-type]
            if name == "fastest":
                for function in ("masked_weight", "masked_weight_backward"):
                    patch.setattr(reference, function, lambda *_: pytest.fail("the definition was used"))
            out, norm = soft_masked_weight(logits, weight, pattern, parametrization, Draw(0.5, 100.0, KEY), want_norm=True)
            ((out * numbers(*shape, seed=2)).sum() + 0.1 * norm).backward()
        assert logits.grad is not None
        results.append((out.detach(), norm.detach(), logits.grad))
    for theirs, mine in zip(*results, strict=True):
        close(mine, theirs, 4e-6, scale=1000)


@pytest.mark.parametrize("n", [None, 2])
def test_the_dispatcher_says_and_does_the_same(n: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernel()
    used: list[str] = []
    for module, name in ((cpu, "C++"), (reference, "torch")):
        for function in ("masked_weight", "masked_weight_backward"):
            original = getattr(module, function)
            monkeypatch.setattr(module, function, lambda *a, f=original, n=name, **k: (used.append(n), f(*a, **k))[1])

    def runs(pattern: Pattern, dtype: torch.dtype, table: Tensor | None = None) -> list[str]:
        used.clear()
        logits, weight, grad = (x.to(dtype) for x in case(pattern, "scores", 9))
        table = pattern.candidates().float() if table is None else table
        kept = pattern.n if n and table.equal(pattern.candidates().float()) else None
        gumbel.masked_weight(logits, weight, table, True, Draw(1.0, 1.0), dtype, False, n=kept)
        total = torch.zeros_like(logits)
        gumbel.masked_weight_backward(grad, None, logits, weight, table, True, Draw(1.0, 1.0), n=kept, accumulate=total)
        assert (total != 0).any()
        return list(used)

    assert runs(Pattern(2, 4), torch.float32) == ["C++", "C++"]
    assert implementation("cpu", 2, 4, torch.float32).startswith("C++ (")
    assert runs(Pattern(2, 4), torch.float64) == ["torch", "torch"]
    assert "no float64" in implementation("cpu", 2, 4, torch.float32, torch.float64)
    assert runs(Pattern(3, 4), torch.float32) == ["torch", "torch"]
    assert "no 3:4, only 1:4, 2:4, 2:8 and 4:8" in implementation("cpu", 3, 4)
    assert runs(Pattern(2, 4), torch.float32, Pattern(2, 4).candidates().float().flip(0)) == ["torch", "torch"]
    with using("torch"):
        assert runs(Pattern(2, 4), torch.float32) == ["torch", "torch"]
        assert implementation("cpu", 2, 4) == "torch, because it was asked for"
    assert runs(Pattern(2, 4), torch.float32) == ["C++", "C++"]
    assert implementation("mps", 2, 4) == "torch, because there is no kernel for mps"


def test_an_unsupported_pattern_is_refused_and_not_computed() -> None:
    need_kernel()
    with pytest.raises(ValueError, match="no 3:4"):
        cpu.masked_weight(torch.zeros(4, 4), torch.ones(4, 4), 3, True, Draw(1.0, 1.0), torch.float32, False)


def test_fake_tensors_pass_through() -> None:
    """torch.compile and FSDP trace with tensors that have no memory."""
    need_kernel()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits, weight, table = torch.zeros(3, 2, 4, requires_grad=True), torch.zeros(3, 8), torch.zeros(6, 4)
        draw = Draw(1.0, 1.0)
        out, norm = soft_masked_weight(
            logits, weight, Pattern(2, 4), "scores", draw, table=table, out_dtype=torch.bfloat16, want_norm=True
        )
        (out.sum() + norm).backward()
        assert (out.shape, out.dtype) == ((3, 8), torch.bfloat16)
        assert logits.grad is not None
        assert logits.grad.shape == (3, 2, 4)


# --- the C++ itself


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_sanitizers(tmp_path: Path) -> None:
    """Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, on arrays that end where their memory ends."""
    assert COMPILER is not None
    source = Path(compress_kernels.__file__).parent / "gumbel" / "cpu.cpp"
    driver = Path(__file__).with_name("gumbel_sanitizer_driver.cpp")
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O0", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f'-DSOURCE="{source}"']
    built = subprocess.run([COMPILER, *flags, str(driver), "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler's sanitizer libraries are not installed")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[0] == "checked"


def test_the_call_has_the_layout_of_the_source() -> None:
    """ctypes lays the structure out as the C++ compiler does: no field of 8 bytes follows an odd number of 4."""
    assert ctypes.sizeof(cpu._Call) == 8 * 8 + 4 * 14


@pytest.mark.parametrize("kernel", ["torch", "fastest"])
@pytest.mark.parametrize("parametrization", BOTH)
def test_parts_of_a_weight_are_masked_as_the_whole(parametrization: Parametrization, kernel: str) -> None:
    """By the number of their first group, forward and back; a part may be empty."""
    pattern = Pattern(2, 4)
    logits, weight, grad = case(pattern, parametrization, 41)
    table, draw, scores = pattern.candidates().float(), Draw(0.5, 10.0, KEY), parametrization == "scores"
    with using(kernel):  # type: ignore[arg-type]
        out, norm = gumbel.masked_weight(logits, weight, table, scores, draw, torch.float32, True, n=2)
        back = gumbel.masked_weight_backward(grad, torch.tensor(0.1), logits, weight, table, scores, draw, n=2)
        outs, norms, backs = [], [], []
        for a, b in ((0, 17), (17, 17), (17, 41)):
            part = [x[a:b] for x in (logits, weight, grad)]
            made, squared = gumbel.masked_weight(*part[:2], table, scores, draw, torch.float32, True, n=2, first_group=a)
            outs.append(made)
            norms.append(squared)
            backs.append(
                gumbel.masked_weight_backward(part[2], torch.tensor(0.1), *part[:2], table, scores, draw, n=2, first_group=a)
            )
    close(torch.cat(outs), out, 4e-6)
    close(torch.cat(backs), back, 4e-6, scale=100)
    close(torch.stack(norms).sum(), norm, 4e-6, scale=10)
