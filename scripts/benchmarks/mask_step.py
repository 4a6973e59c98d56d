"""What learning masks costs a training step, in time and in memory, on a real model.

    bash scripts/get_smollm2.sh && python scripts/benchmarks/mask_step.py [--json]

A step here is a forward and a backward pass: the cross-entropy of random tokens under bfloat16 autocast, as in maskllm.learner, with
2:4 scores on every linear layer of the blocks. The optimizer's step and the teacher's pass are not part of it: both cost the same
whatever computes the mask. The floor is the same two passes of the same network with ordinary weight gradients and no mask,
its weights already in bfloat16 so that autocast converts nothing. `overhead_T` is how much longer a masked step of T tokens takes:
seconds / floor - 1. Compared are

    fused            the kernel that `compress_kernels.gumbel` chooses here
    fused, noise     the same with Gumbel noise
    torch            compress_kernels/gumbel/reference.py, which keeps chunks in cache
    eager, noise     the formulas as one writes them down: whole-tensor expressions under autograd

all in one process, one step of each in turn, medians over the turns, because machines change their speed.

`copy_bandwidth_share`: one forward pass of the kernel over all weights, one layer after the other (float32 scores and weights in,
bfloat16 out, no noise), bytes over seconds, relative to `Tensor.copy_` of float32 over as many bytes in the same turn. Both write to
memory that is there. 1 would be a kernel that costs nothing beside moving its operands.

`bytes_per_weight_standard` and `_lean`: the peak of resident memory during two steps of a maskllm.learner.Learner, optimizer included,
less the peak of a forward and backward pass of the same network without masks, over the number of masked weights; each in a
process of its own, 32 tokens a step so that activations are small. Standard keeps float32 logits, gradients and Adam moments;
lean is `state: 8bit` with `step_in_backward` and `checkpoint_activations`, its dense network checkpointed too. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.models import load_model
from compress.weights import by_parameter, decoder_blocks, find_weights
from compress_kernels.gumbel import Draw, implementation, masked_weight, using
from maskllm.gumbel import prior_logits
from maskllm.objective import token_loss
from maskllm.parametrization import MaskState, MaskTarget, attach, detach
from maskllm.patterns import Pattern

PATTERN = Pattern(2, 4)
TAU, KAPPA = 0.2, 200.0  # the middle of the SmolLM2 recipe's run
LENGTH = 256  # tokens of a sequence
MEMORY_LENGTH = 32  # where memory is measured, so that activations and token losses add little to what masks take


def targets_of(model: nn.Module) -> list[MaskTarget]:
    return [MaskTarget(p.name, p.module, p.parameter_name, p.contracted_dim) for p in by_parameter(find_weights(model))]


def start(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(scores that favour the magnitude mask, that mask), by name."""
    priors = {name: PATTERN.best_of(w.detach().abs()) for name, w in weights.items()}
    scores = {
        name: prior_logits(mask, PATTERN, "scores", strength=3, std=0.01, noise=True, generator=torch.Generator().manual_seed(0))
        for name, mask in priors.items()
    }
    return scores, priors


class EagerMask(nn.Module):
    """The paper's equations 4 to 7 with a score for each weight, as whole-tensor expressions."""

    def __init__(self, scores: Tensor, noise: bool) -> None:
        super().__init__()
        self.scores, self.noise = nn.Parameter(scores), noise
        self.register_buffer("table", PATTERN.candidates().float(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            z = KAPPA * (self.scores @ self.table.t())
            if self.noise:
                z = z - torch.log(-torch.log(torch.rand_like(z).clamp_(1e-7, 1 - 1e-7)))
            mask = torch.softmax(z / TAU, -1) @ self.table
            return weight * mask.flatten(-2)


class Steps:
    """The variants of a step on one model; nothing of one is left when the next begins."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.targets = model, targets_of(model)
        model.requires_grad_(False)
        self.weights = {t.name: getattr(t.module, t.parameter_name) for t in self.targets}
        self.scores, _ = start(self.weights)

    def variants(self) -> dict[str, Callable[[], Any]]:
        return {
            "floor": self.dense,
            "fused": lambda: self.masked(False),
            "fused, noise": lambda: self.masked(True),
            "torch": lambda: self.masked(False, "torch"),
            "torch, noise": lambda: self.masked(True, "torch"),
            "eager, noise": lambda: self.eager(True),
        }

    @contextmanager
    def dense(self) -> Iterator[list[nn.Parameter]]:
        original = {name: p.data for name, p in self.weights.items()}
        for p in self.weights.values():
            p.data = p.data.bfloat16()
            p.requires_grad_(True)
        try:
            yield list(self.weights.values())
        finally:
            for name, p in self.weights.items():
                p.requires_grad_(False)
                p.data = original[name]

    @contextmanager
    def masked(self, noise: bool, kernel: Any = "fastest") -> Iterator[list[nn.Parameter]]:
        state = MaskState(PATTERN, "scores", noise=noise, tau=TAU, kappa=KAPPA)
        masks = attach(self.targets, state, self.scores)
        try:
            with using(kernel):
                yield [m.logits for m in masks.values()]
        finally:
            detach(self.targets)

    @contextmanager
    def eager(self, noise: bool) -> Iterator[list[nn.Parameter]]:
        masks = [EagerMask(self.scores[t.name], noise) for t in self.targets]
        for target, mask in zip(self.targets, masks, strict=True):
            parametrize.register_parametrization(target.module, target.parameter_name, mask, unsafe=True)
        try:
            yield [m.scores for m in masks]
        finally:
            detach(self.targets)

    def seconds(self, variant: Callable[[], Any], ids: Tensor) -> float:
        with variant() as learned:
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.model(input_ids=ids, use_cache=False).logits
            token_loss(logits, None, ids, ce_weight=1, kl_weight=0)[0].backward()
            taken = time.perf_counter() - began
            assert all(p.grad is not None for p in learned)
            for p in learned:
                p.grad = None
        return taken


def time_steps(steps: Steps, vocabulary: int, tokens: Sequence[int], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of every variant by number of tokens, after one step of each to warm up."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats + 1):
        for count in tokens if turn else tokens[:1]:
            ids = torch.randint(vocabulary, (count // LENGTH, LENGTH), generator=torch.Generator().manual_seed(turn))
            for name, variant in steps.variants().items():
                taken = steps.seconds(variant, ids)
                if turn:
                    found.setdefault(str(count), {}).setdefault(name, []).append(taken)
                print(f"turn {turn}/{repeats}, {count} tokens, {name}: {taken:.3f} s", file=sys.stderr)
    return {count: {name: statistics.median(v) for name, v in row.items()} for count, row in found.items()}


def time_passes(steps: Steps, repeats: int) -> dict[str, float]:
    """GB/s of copying and of one kernel pass over all weights, and the share; medians of the shares turn by turn."""
    layers = [(steps.scores[name].reshape(-1, 4), w.reshape(-1, 4)) for name, w in steps.weights.items()]
    outs = [torch.empty(w.shape, dtype=torch.bfloat16) for _, w in layers]
    norm = torch.zeros((), dtype=torch.float64)
    count = sum(w.numel() for _, w in layers)
    moved = 10 * count  # 4 + 4 in, 2 out
    pairs = [(torch.empty(w.numel() * 5 // 4).normal_(), torch.empty(w.numel() * 5 // 4)) for _, w in layers]

    def copy() -> None:
        for source, goal in pairs:
            goal.copy_(source)

    def kernel(key: int | None) -> None:
        for (scores, w), out in zip(layers, outs, strict=True):
            torch.ops.compress_kernels.soft_mask(out, norm, scores, w, 2, True, TAU, KAPPA, key, False, False, 0)

    # What soft_mask writes is what the public function returns.
    kernel(None)
    (scores, w), out = layers[0], outs[0]
    again, _ = masked_weight(scores, w, PATTERN.candidates().float(), True, Draw(TAU, KAPPA), torch.bfloat16, False, n=2)
    assert torch.equal(again, out)

    rates: dict[str, list[float]] = {"copy": [], "pass": [], "pass, noise": []}
    for turn in range(4 * repeats + 1):
        for name, run in (("copy", copy), ("pass", lambda: kernel(None)), ("pass, noise", lambda: kernel(7))):
            began = time.perf_counter()
            run()
            if turn:
                rates[name].append(moved / (time.perf_counter() - began) / 1e9)
    share = statistics.median(a / b for a, b in zip(rates["pass"], rates["copy"], strict=True))
    noisy = statistics.median(a / b for a, b in zip(rates["pass, noise"], rates["copy"], strict=True))
    medians = {f"gigabytes_per_second_{name.replace(', ', '_')}": statistics.median(v) for name, v in rates.items()}
    return {**medians, "copy_bandwidth_share": share, "copy_bandwidth_share_noise": noisy}


# --- memory, in processes of their own


def peak_bytes(work: Callable[[], object]) -> int:
    """The most resident memory the process had during `work`."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    work()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure_memory(kind: str, source: str) -> dict[str, int]:
    """In a child: peak of a dense pass, or of two steps of a learner. kind: dense, dense-checkpointed, standard or lean."""
    from accelerate import Accelerator

    from maskllm.learner import Learner
    from maskllm.recompute import checkpoint_blocks
    from maskllm.settings import LearnSettings

    model: Any = load_model(source, dtype="float32", tokenizer=False).model
    targets = targets_of(model)
    weights = {t.name: getattr(t.module, t.parameter_name) for t in targets}
    count = sum(w.numel() for w in weights.values())
    blocks = [block.module for block in decoder_blocks(model)]
    ids = torch.randint(model.config.vocab_size, (1, MEMORY_LENGTH), generator=torch.Generator().manual_seed(0))

    if kind.startswith("dense"):
        model.requires_grad_(False)
        release = checkpoint_blocks(blocks if kind == "dense-checkpointed" else ())

        def work() -> None:
            for _ in range(2):
                embedded = model.get_input_embeddings()(ids).requires_grad_()
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(inputs_embeds=embedded, use_cache=False).logits
                token_loss(logits, None, ids, ce_weight=1, kl_weight=0)[0].backward()

        peak = peak_bytes(work)
        release()
        return {"weights": count, "peak": peak}

    lean: dict[str, Any] = {"state": "8bit", "step_in_backward": True, "clip_by": "weight", "checkpoint_activations": True}
    settings = LearnSettings(
        steps=100,
        batch=1,
        micro_batch=1,
        parametrization="scores",
        noise=False,
        regulariser=0,
        **(lean if kind == "lean" else {}),
    )
    scores, prior = start(weights)
    learner = Learner(model, targets, PATTERN, settings, scores, prior, Accelerator(cpu=True), blocks=blocks)
    del scores, weights

    def learn() -> None:
        records = learner.steps(lambda step, size: ids)
        next(records), next(records)

    return {"weights": count, "peak": peak_bytes(learn)}


def bytes_per_weight(source: str, threads: int) -> dict[str, float]:
    def child(kind: str) -> dict[str, int]:
        command = [sys.executable, __file__, "--memory", kind, "--model", source, "--threads", str(threads)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, int] = json.loads(ran.stdout)
        print(f"memory, {kind}: peak {found['peak'] / 1e9:.2f} GB", file=sys.stderr)
        return found

    found = {}
    for kind, floor in (("standard", "dense"), ("lean", "dense-checkpointed")):
        masked, dense = child(kind), child(floor)
        found[f"bytes_per_weight_{kind}"] = (masked["peak"] - dense["peak"]) / masked["weights"]
        found[f"peak_gigabytes_{kind}"] = masked["peak"] / 1e9
    return found


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else "unknown"


def print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}: {report['implementation']}")
    table = Table(title=f"forward + backward, {report['weights']:,} masked weights")
    table.add_column("variant")
    for count in report["seconds"]:
        table.add_column(f"{count} tokens, s", justify="right")
        table.add_column("overhead", justify="right")
    for name in next(iter(report["seconds"].values()), {}):
        cells = [(row[name], row[name] / row["floor"] - 1) for row in report["seconds"].values()]
        table.add_row(name, *(x for seconds, over in cells for x in (f"{seconds:.3f}", f"{100 * over:.1f} %")))
    console.print(table)
    for key, value in report.items():
        if isinstance(value, float):
            console.print(f"{key}: {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m.gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help=f"a step; multiples of {LENGTH}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["steps", "pass", "memory"], help="one of the three measurements")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory", choices=["dense", "dense-checkpointed", "standard", "lean"], help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    if wanted.memory:
        print(json.dumps(measure_memory(wanted.memory, wanted.model)))
        return
    report: dict[str, Any] = {
        "machine": machine(),
        "threads": wanted.threads,
        "torch": torch.__version__,
        "implementation": implementation("cpu", 2, 4, torch.float32, torch.bfloat16),
        "seconds": {},
    }
    if wanted.only != "memory":
        model: Any = load_model(wanted.model, dtype="float32", tokenizer=False).model
        steps = Steps(model)
        report["weights"] = sum(w.numel() for w in steps.weights.values())
        if wanted.only != "steps":
            report |= time_passes(steps, wanted.repeats)
        if wanted.only != "pass":
            report["seconds"] = time_steps(steps, model.config.vocab_size, wanted.tokens, wanted.repeats)
            for count, row in report["seconds"].items():
                for name, seconds in row.items():
                    if name != "floor":
                        suffix = "" if name == "fused" else "_" + name.removeprefix("fused, ").replace(", ", "_")
                        report[f"overhead{suffix}_{count}"] = seconds / row["floor"] - 1
    if wanted.only in (None, "memory"):
        report |= bytes_per_weight(wanted.model, wanted.threads)
    if wanted.json:
        print(json.dumps(report))
    else:
        print_tables(report)


if __name__ == "__main__":
    main()
