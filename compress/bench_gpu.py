"""What computes packed products on this machine's GPU: the outcomes of the probes of compress_kernels.sparse24.cuda, or why there are none.

`cuda.py` times all implementations with the first product of each shape, number of tokens and type, and keeps to the fastest. What it
found says which sparse kernels run on this GPU at all, and whether any of them beats torch's dense product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.bench import random_sparse24
from compress.errors import CompressError, UsageError
from compress_kernels import sparse24

DEVICE = "cuda"
DOCTOR_SHAPES, DOCTOR_BATCHES = ((4096, 4096),), (1, 16, 256)  # a layer of Llama-2-7B: decoding, a few tokens, a prompt


@dataclass(frozen=True)
class GpuChoice:
    """The probe of products x `[tokens, k]` with packed `[n, k]`, of more than half of `tokens` up to `tokens` tokens.

    `backend` is what such products take from then on, `microseconds` what each implementation took, the preferred first (`dense` has to
    win by a margin), and `failures` why others did not run. `speedup_vs_dense`: the time of torch's product with a dense copy over that
    of `backend`, or None without it.
    """

    device: str
    n: int
    k: int
    tokens: int
    activations: str
    values: str
    backend: str
    microseconds: dict[str, float]
    failures: dict[str, str]
    speedup_vs_dense: float | None

    def __str__(self) -> str:
        first, *others = self.microseconds.items()
        parts = [f"{first[0]}, {first[1]:,.1f} µs"]
        if self.speedup_vs_dense is not None and self.backend != "dense":
            parts[0] += f", {self.speedup_vs_dense:.2f} x dense"
        seen = {first[0].split()[0]}
        for name, time in others:  # of each family the best
            if name.split()[0] not in seen:
                seen.add(name.split()[0])
                parts.append(f"{name} {time:,.1f}")
        parts += [f"{name} failed ({reason})" for name, reason in self.failures.items()]
        return "; ".join(parts)

    @property
    def case(self) -> str:
        """The products in words."""
        least = self.tokens // 2 + 1
        tokens = (
            "1 token"
            if self.tokens == 1
            else f"{least} to {self.tokens} tokens"
            if least < self.tokens
            else f"{self.tokens} tokens"
        )
        types = self.values if self.values == self.activations else f"{self.values} times {self.activations}"
        return f"{self.n} x {self.k}, {tokens}, {types}"


def unavailable() -> str:
    """Why no GPU of this machine computes packed products; empty where one does."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return sparse24.implementation("cuda").reason


def choices() -> list[GpuChoice]:
    """What has been chosen in this process so far, in the order of the probes; empty without a GPU."""
    if unavailable():
        return []
    from compress_kernels.sparse24 import cuda

    rows = []
    for choice in cuda.choices():
        times, case = {name: choice.microseconds[name] for name in choice.ranking}, choice.case
        dense = times.get("dense")
        rows.append(
            GpuChoice(
                device=str(case.device),
                n=case.n,
                k=case.k,
                tokens=case.bucket,
                activations=str(case.x_dtype).removeprefix("torch."),
                values=str(case.value_dtype).removeprefix("torch."),
                backend=choice.backend,
                microseconds=times,
                failures=choice.failures,
                speedup_vs_dense=None if dense is None else dense / times[choice.backend],
            )
        )
    return rows


def probe(
    shapes: Sequence[tuple[int, int]] = DOCTOR_SHAPES,
    batches: Sequence[int] = DOCTOR_BATCHES,
    values: torch.dtype = torch.bfloat16,
) -> list[GpuChoice]:
    """Multiply random packed matrices `[n, k]` with so many tokens each, and return all `choices` of this process.

    Activations are bfloat16 with int8 values and of the values' type otherwise. The first time Triton compiles its kernels, which takes
    a minute or so. Raises CompressError when no GPU computes packed products, and when not even torch's dense product runs;
    UsageError for a k that is not a multiple of 4.
    """
    reason = unavailable()
    if reason:
        raise CompressError(f"there is nothing to time on a GPU: {reason}")
    if any(k % 4 for _, k in shapes):
        raise UsageError(f"2:4 layers have a multiple of 4 inputs; the shapes are N x K: {shapes}")
    activations = torch.bfloat16 if values == torch.int8 else values
    for n, k in shapes:
        try:
            packed = sparse24.pack(random_sparse24(n, k), values).to(DEVICE)
            for batch in batches:
                sparse24.linear(torch.randn(batch, k, device=DEVICE).to(activations), packed)
        except RuntimeError as error:  # out of memory among them
            raise CompressError(f"the GPU did not compute a 2:4 product of {n} x {k}: {error}") from error
    return choices()
