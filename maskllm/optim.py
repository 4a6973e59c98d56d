"""AdamW for logits, with its state in 4, 2 or 1 byte a number, and a step that one weight can take alone.

The update is AdamW's (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), always computed in float32. What differs is how
logits and moments are kept between two steps:

| state      | logits   | first moment m | second moment v | bytes a logit |
| ---------- | -------- | -------------- | --------------- | ------------- |
| `float32`  | float32  | float32        | float32         | 12            |
| `bfloat16` | bfloat16 | bfloat16       | bfloat16        | 6             |
| `8bit`     | bfloat16 | 8-bit codes    | 8-bit codes     | 4.03          |

Everything narrower than float32 is rounded stochastically: up or down with the probabilities that make the mean exact. Rounded to
nearest, a bfloat16 logit would not move at all under steps below 1/512 of it, and a moment that decays by less than half a
code a step would never decay. The random bits are counter-based (`random_bits` of seed, step, number of the weight), so a
resumed run, or one on another number of threads, rounds to the same bits.

The 8-bit codes. Numbers are taken in blocks of 256 in memory order; a block keeps its largest magnitude as a float32 scale, and of
every number the ratio y in [0, 1] to it as a small floating-point number with 3 fraction bits, placed so that the highest code is 1:

    m: sign bit and 7 bits of |y|: 4 bits of exponent, down to 1.25 * 2^-16; below that 0.
    v: 8 bits of y: 5 bits of exponent, down to 1.25 * 2^-32; what is smaller but not 0 is kept as that, never as 0.

Two neighbouring codes are a factor 1 + 1/8 or less apart, so one rounding is off by less than 12.5 % of the number (3.5 % in root mean
square) and by nothing on average; as Adam divides by sqrt(v), its error there is half as large, and both moments reach down
to the same gradients, 2^-16 of the block's largest. (Dettmers et al., arXiv 2110.02861, introduced block-wise 8-bit optimizer
states; their codes are another, nearest-rounded table.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw

from compress_kernels.gumbel import random_bits, stream_key
from maskllm.errors import MaskError

StateFormat = Literal["float32", "bfloat16", "8bit"]

BLOCK = 256  # numbers that share a scale
_CPU_CHUNK = 1 << 16  # numbers updated at once: some ten float32 temporaries that stay in the second-level cache
_GPU_CHUNK = 1 << 24
_TOP = 127 << 3  # the upper 12 bits of the float32 1.0: exponent and 3 fraction bits
_STEP, _SUM = 1, 2  # first parts of the keys: no two uses of the random bits share a stream
_CUT = 12  # of the 20 bits that a code lacks of a float32, the upper 8 are random


def logit_dtype(state: StateFormat) -> torch.dtype:
    """The type logits are kept in."""
    return torch.float32 if state == "float32" else torch.bfloat16


def state_bytes(state: StateFormat, count: int) -> int:
    """Bytes of `count` logits of one weight with both moments."""
    if state == "8bit":
        return 4 * count + 2 * 4 * _blocks(count)
    return 3 * logit_dtype(state).itemsize * count


def encode(values: Tensor, random: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 `[n]`, n a multiple of 256, to 8-bit codes: (uint8 `[n]`, float32 scales `[n / 256]`).

    random: int32 `[n]` in [0, 256), what decides the rounding; signed: the code of m, else that of v (see the module).
    Rounding is unbiased to 2^-9 of a code's distance to the next.
    """
    grouped = values.view(-1, BLOCK)
    scale = grouped.abs().amax(1) if signed else grouped.amax(1)
    ratio = (grouped / (scale + (scale == 0)).unsqueeze(1)).view(-1).view(torch.int32)
    magnitude = ratio & 0x7FFFFFFF if signed else ratio
    highest = 127 if signed else 255
    # Between two powers of two floats are as far apart as their bits: adding random low bits and cutting them off rounds stochastically.
    code = (random << _CUT).add_(magnitude).add_((1 << _CUT - 1) - (_TOP - highest << 20)).bitwise_right_shift_(20)
    if signed:
        code.clamp_(0, highest).bitwise_or_((ratio >> 24).bitwise_and_(0x80))
    else:
        code = code.clamp_(1, highest).minimum(ratio)  # a ratio of 0 has the bits 0, any other's are larger than a code
    return code.to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """What `encode` encoded, up to the rounding: float32 `[n]`."""
    values = code_table(signed, str(codes.device)).index_select(0, codes.to(torch.int32))
    return values.view(-1, BLOCK).mul_(scale.unsqueeze(1)).view(-1)


@lru_cache(maxsize=8)
def code_table(signed: bool, device: str = "cpu") -> Tensor:
    """The 256 numbers that the codes stand for, relative to their block's scale: float32."""
    code = torch.arange(256, dtype=torch.int32)
    magnitude, highest = (code & 0x7F, 127) if signed else (code, 255)
    value = (magnitude + (_TOP - highest) << 20).view(torch.float32) * (magnitude > 0)
    return (torch.where(code > 127, -value, value) if signed else value).to(device)


def to_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """Round float32 stochastically to bfloat16. random: int32 in [0, 65536), of the same shape."""
    bits = (values.view(torch.int32) + random) & -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)  # exact: the cut bits are 0


@torch.no_grad()
def accumulate(total: Tensor, grad: Tensor, *counter: int) -> None:
    """`total += grad` for bfloat16 tensors of one shape, rounded stochastically: small terms of a long sum are not lost.

    counter: numbers that no other sum of the run has together; they decide the rounding.
    """
    key = stream_key(_SUM, *counter)
    flat, new = total.view(-1), grad.reshape(-1)
    for a, b in _chunks(flat):
        random = random_bits(key, a, b - a, flat.device) & 0xFFFF
        flat[a:b] = to_bfloat16(flat[a:b].float() + new[a:b].float(), random)


@torch.no_grad()
def squared_norm(tensor: Tensor) -> Tensor:
    """Sum of squares, float32, in an order of its own: the same bits on any number of threads."""
    flat = tensor.reshape(-1)
    if not len(flat):
        return torch.zeros((), device=tensor.device)
    sums = torch.stack([_tree_sum(flat[a:b].float().square()) for a, b in _chunks(flat)])
    return _tree_sum(sums)


def _tree_sum(values: Tensor) -> Tensor:
    while values.numel() > 1:
        values = functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK).sum(1)
    return values.view(())


class MaskAdamW(torch.optim.Optimizer):
    """AdamW over logits, whose dtype must be `logit_dtype(state)`; `step_one` moves one of them alone, as from a backward hook.

    betas, eps, weight_decay: AdamW's, `lr` a group's. seed: of the stochastic rounding, which also depends on the number of the parameter and
    on its steps so far. firsts: for each parameter that is a part of a longer one the number of its first logit there, a multiple of 256;
    it is then rounded as that part of the whole would be. Raises MaskError for logits of another dtype.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        state: StateFormat = "float32",
        seed: int = 0,
        firsts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.format, self.seed, self.firsts = state, seed, firsts
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype != logit_dtype(state):
                    raise MaskError(f"logits are {p.dtype}, but a {state} state keeps them in {logit_dtype(state)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        if closure is not None:
            raise MaskError("MaskAdamW takes no closure")
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, number, group, None)
                number += 1

    @torch.no_grad()
    def step_one(self, parameter: torch.nn.Parameter, gain: Tensor | None = None) -> None:
        """One step of this parameter from its gradient times `gain` (a scalar tensor); the same bits as `step`."""
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p is parameter:
                    self._update(p, number, group, gain)
                    return
                number += 1
        raise MaskError("this parameter is none of the optimizer's")

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's moments as they are kept, zero before the first step."""
        if parameter not in self.state:
            self.state[parameter] = {"step": 0, **self._empty(parameter)}
        return {key: value for key, value in self.state[parameter].items() if key != "step"}

    def load_moments(self, parameter: Tensor, steps: int, moments: dict[str, Tensor]) -> None:
        """Go on from `moments` after `steps` steps. Raises MaskError when they are not of this format."""
        expected = self._empty(parameter, "meta")
        if moments.keys() != expected.keys() or any(
            moments[k].shape != v.shape or moments[k].dtype != v.dtype for k, v in expected.items()
        ):
            raise MaskError(f"the saved optimizer state is not that of a {self.format} state of logits {tuple(parameter.shape)}")
        self.state[parameter] = {"step": steps, **{k: moments[k].to(parameter.device) for k in expected}}

    def _empty(self, p: Tensor, device: str | None = None) -> dict[str, Tensor]:
        if self.format != "8bit":
            return {key: torch.zeros_like(p, device=device or p.device) for key in ("exp_avg", "exp_avg_sq")}
        empty = {}
        for key in ("exp_avg", "exp_avg_sq"):
            empty[f"{key}_codes"] = torch.zeros(p.numel(), dtype=torch.uint8, device=device or p.device)
            empty[f"{key}_scales"] = torch.zeros(_blocks(p.numel()), device=device or p.device)
        return empty

    def _update(self, p: Tensor, number: int, group: dict[str, Any], gain: Tensor | None) -> None:
        moments = self.moments(p)
        self.state[p]["step"] += 1
        steps: int = self.state[p]["step"]
        beta1, beta2 = group["betas"]
        assert p.grad is not None
        if self.format == "float32":
            grad = p.grad if gain is None else p.grad.mul_(gain)
            before = torch.tensor(float(steps - 1), device=p.device)
            options = {key: group[key] for key in ("lr", "weight_decay", "eps")}
            adamw(
                [p], [grad], [moments["exp_avg"]], [moments["exp_avg_sq"]], [], [before],
                fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **options,
            )  # fmt: skip
            return
        key = stream_key(_STEP, self.seed, steps, number)
        logits, grads = p.view(-1), p.grad.reshape(-1)
        first = self.firsts[number] if self.firsts else 0
        for a, b in _chunks(logits):
            random = random_bits(key, first + a, b - a, p.device)
            g = grads[a:b].float()
            if gain is not None:
                g *= gain
            kept = _Moments(self.format, moments, a, b)
            m = kept.read("exp_avg").mul_(beta1).add_(g, alpha=1 - beta1)
            v = kept.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
            kept.write("exp_avg", m, (random >> 16) & 0xFF)
            kept.write("exp_avg_sq", v, (random >> 24) & 0xFF)
            x = logits[a:b].float()
            if group["weight_decay"]:
                x *= 1 - group["lr"] * group["weight_decay"]
            size = v.div_(1 - beta2**steps).sqrt_().add_(group["eps"])
            x.addcdiv_(m, size, value=-group["lr"] / (1 - beta1**steps))
            logits[a:b] = to_bfloat16(x, random & 0xFFFF)


class _Moments:
    """Elements a to b of a parameter's moments; a is a multiple of 256, b too or the end."""

    def __init__(self, state: StateFormat, tensors: dict[str, Tensor], a: int, b: int) -> None:
        self.coded, self.tensors, self.a, self.b = state == "8bit", tensors, a, b
        self.padding = -(b - a) % BLOCK
        self.blocks = slice(a // BLOCK, _blocks(b))

    def read(self, key: str) -> Tensor:
        """float32 `[b - a]`, a fresh tensor."""
        if not self.coded:
            return self.tensors[key].view(-1)[self.a : self.b].float()
        codes = _padded(self.tensors[f"{key}_codes"][self.a : self.b], self.padding)
        values = decode(codes, self.tensors[f"{key}_scales"][self.blocks], signed=key == "exp_avg")
        return values[: self.b - self.a]

    def write(self, key: str, values: Tensor, random: Tensor) -> None:
        """random: int32 in [0, 256)."""
        if not self.coded:
            self.tensors[key].view(-1)[self.a : self.b] = to_bfloat16(values, (random << 8) | 0x80)
            return
        codes, scale = encode(_padded(values, self.padding), _padded(random, self.padding), signed=key == "exp_avg")
        self.tensors[f"{key}_codes"][self.a : self.b] = codes[: self.b - self.a]
        self.tensors[f"{key}_scales"][self.blocks] = scale


def _padded(vector: Tensor, zeros: int) -> Tensor:
    return functional.pad(vector, (0, zeros)) if zeros else vector


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _chunks(flat: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges that together cover a vector, each beginning at a multiple of 256."""
    size = _CPU_CHUNK if flat.device.type == "cpu" else _GPU_CHUNK
    for start in range(0, flat.numel(), size):
        yield start, min(flat.numel(), start + size)
