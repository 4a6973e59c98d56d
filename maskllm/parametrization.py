"""A learnable mask over any frozen weight, by `torch.nn.utils.parametrize`.

`attach` puts a module over a parameter that returns `weight * mask` wherever the network reads it; the network itself is not
changed, and `detach` takes the mask away again and leaves the original weight. It works the same for `nn.Linear` and for the
fused 3-D expert parameters of mixture-of-experts layers.

Every mask of a network reads one `MaskState`, which the training loop moves: the step, the micro-batch, temperature, scale, and
whether masks act at all (in dense mode the same network is its own teacher).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_kernels.gumbel import Draw, stream_key
from maskllm.errors import MaskError
from maskllm.gumbel import Parametrization, hard_mask, logit_width, soft_masked_weight
from maskllm.patterns import Pattern
from maskllm.sharding import Shard, ShardedSoftMask, Sharding


@dataclass(frozen=True, eq=False)
class MaskTarget:
    """One weight to mask. `contracted_dim` (-1 or -2) is the dimension that the products sum over; groups run along it."""

    name: str
    module: nn.Module
    parameter_name: str
    contracted_dim: int


@dataclass
class MaskState:
    """What all masks of one network share.

    noise adds Gumbel noise; hard is straight-through; penalised also sums w'^2. mode: `soft` draws masks to learn from, `final`
    multiplies by the mask the logits stand for now, `dense` computes with the original weights. processes, rank: how many learn together,
    each on micro-batches of its own, and which this one is; shard: what they share out (`maskllm.sharding`).
    """

    pattern: Pattern
    parametrization: Parametrization
    seed: int = 0
    noise: bool = True
    hard: bool = False
    penalised: bool = False
    mode: Literal["soft", "final", "dense"] = "soft"
    tau: float = 4.0
    kappa: float = 100.0
    step: int = 0
    micro_batch: int = 0  # of this process: the number `rank` of those that the processes take at once
    processes: int = 1
    rank: int = 0
    shard: Sharding = "none"

    @contextmanager
    def using(self, mode: Literal["soft", "final", "dense"]) -> Iterator[None]:
        """Within it the network computes in another mode."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before


class WeightMask(nn.Module):
    """The learnable mask of one weight: logits `[..., K/M, C]` or `[..., K/M, M]` over the weight with its contracted dimension last.

    Where the state is sharded, `logits` are this process's rows of them, `[rows, K/M, C or M]` with leading dimensions flattened, and every
    method that takes or returns a whole weight or mask must be called by all processes. Where weights are shared out too, the parameter
    under the mask is this process's rows of it, `[rows, K]`; whole weights are made anew whenever the network reads one.
    """

    table: Tensor

    def __init__(
        self, state: MaskState, logits: Tensor, layer: int, contracted_dim: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.state, self.layer, self.contracted_dim = state, layer, contracted_dim
        self.shape = (*logits.shape[:-2], logits.shape[-2] * state.pattern.m)  # of the weight, contracted dimension last
        self.shard: Shard | None = None
        if state.shard != "none":
            rows = logits.reshape(-1, *logits.shape[-2:])
            self.shard = Shard.of(len(rows), rows.shape[1] * rows.shape[2], state.rank, state.processes)
            logits = rows[self.shard.own].clone()
        self.logits = nn.Parameter(logits.to(device))
        self.register_buffer("table", state.pattern.candidates().to(self.logits), persistent=False)
        self.home: torch.device | None = None  # where the weight was before it was shared out
        self.squared_norm: Tensor | None = None  # of the last forward pass, when the state is `penalised`

    def forward(self, weight: Tensor) -> Tensor:
        state = self.state
        shared = state.shard == "weights"
        if state.mode == "dense":
            return self.whole(weight) if shared else weight
        if state.mode == "final":
            return self.whole(weight * self._own_mask()) if shared else weight * self.hard()
        device = weight.device.type
        # Under autocast the product wants this dtype anyway; made here, it costs no extra pass over the weight.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        out, norm = self._soft(weight if shared else _moved(weight, self.contracted_dim, -1), dtype)
        self.squared_norm = norm if state.penalised else None
        return _moved(out, -1, self.contracted_dim)

    def _soft(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        state = self.state
        if self.shard is not None:
            draws = [self._draw(state.micro_batch - state.rank + other) for other in range(state.processes)]
            own = weight.detach() if state.shard == "weights" else self._own_of(weight.detach())
            scores = state.parametrization == "scores"
            out, norm = ShardedSoftMask.apply(
                self.logits, own, self.table, state.pattern.n, scores, draws, self.shard, dtype, state.penalised
            )
            return out.view(self.shape), norm
        return soft_masked_weight(
            self.logits,
            weight,
            state.pattern,
            state.parametrization,
            self._draw(state.micro_batch),
            table=self.table,
            out_dtype=dtype,
            want_norm=state.penalised,
        )

    def _draw(self, micro_batch: int) -> Draw:
        state = self.state
        key = stream_key(state.seed, state.step, micro_batch, self.layer) if state.noise else None
        return Draw(tau=state.tau, kappa=state.kappa, noise_key=key, hard=state.hard)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The mask that the logits stand for now: bool, of the weight's own shape."""
        mask = self._own_mask()
        if self.shard is not None:
            mask = self.shard.gather(mask).view(self.shape)
        return mask.movedim(-1, self.contracted_dim)

    def own_rows(self, weight: Tensor) -> Tensor:
        """A copy of this process's rows, `[own, K]`, of a whole weight."""
        return self._own_of(weight.detach().movedim(self.contracted_dim, -1)).clone()

    def whole(self, own: Tensor) -> Tensor:
        """The whole weight of every process's rows `[own, K]` of it, with its elements in memory in the order of its dimensions."""
        assert self.shard is not None
        # That order is the network's: over another one a product may add up differently.
        return _moved(self.shard.gather(own).view(self.shape), -1, self.contracted_dim).contiguous()

    def _own_of(self, weight: Tensor) -> Tensor:
        """The rows of this process, contracted dimension last."""
        assert self.shard is not None
        return weight.reshape(-1, weight.shape[-1])[self.shard.own]

    def _own_mask(self) -> Tensor:
        return hard_mask(self.logits, self.state.pattern, self.state.parametrization)


def _moved(tensor: Tensor, source: int, to: int) -> Tensor:
    """`movedim` that costs nothing where nothing moves: as an operation of autograd it would, twice a weight and pass."""
    return tensor if source == to else tensor.movedim(source, to)


def attach(
    targets: Iterable[MaskTarget], state: MaskState, logits: dict[str, Tensor], device: torch.device | None = None
) -> dict[str, WeightMask]:
    """Put a mask over every target. `logits[name]` starts it (`maskllm.gumbel.prior_logits`). Freezes the masked weights.

    Weights that are shared out are replaced by this process's rows of them; whoever else holds such a parameter keeps all of it in memory.
    device: where logits and these rows go, so that no more than they is ever there; by default where a weight is.
    Raises MaskError where M does not divide a contracted dimension or logits have the wrong shape.
    """
    masks: dict[str, WeightMask] = {}
    targets = list(targets)
    for target in targets:  # all of them before the first is attached
        shape = getattr(target.module, target.parameter_name).movedim(target.contracted_dim, -1).shape
        state.pattern.check_divides(shape[-1], target.name)
        expected = (*shape[:-1], shape[-1] // state.pattern.m, logit_width(state.pattern, state.parametrization))
        if logits[target.name].shape != expected:
            raise MaskError(f"{target.name}: logits {tuple(logits[target.name].shape)} were given, but its masks take {expected}")
    for layer, target in enumerate(targets):
        weight = getattr(target.module, target.parameter_name)
        mask = WeightMask(state, logits[target.name], layer, target.contracted_dim, device or weight.device)
        weight.requires_grad_(False)
        parametrize.register_parametrization(target.module, target.parameter_name, mask, unsafe=True)
        if state.shard == "weights":
            mask.home = weight.device
            _replace(target, mask.own_rows(weight).to(mask.logits.device))
        masks[target.name] = mask
    return masks


def detach(targets: Iterable[MaskTarget]) -> None:
    """Take the masks away; every weight is again exactly what it was, and where it was.

    Weights that were shared out are gathered one after the other, for which all processes must call it.
    """
    for target in targets:
        if parametrize.is_parametrized(target.module, target.parameter_name):
            mask, rows = _mask_and_parameter(target)
            if mask.home is not None:
                _replace(target, mask.whole(rows.detach()).to(mask.home))
            parametrize.remove_parametrizations(target.module, target.parameter_name, leave_parametrized=False)


def own_parameter(target: MaskTarget) -> nn.Parameter:
    """What is kept of a target's weight under its mask: the weight, or this process's rows `[own, K]` where weights are shared out."""
    return _mask_and_parameter(target)[1]


def _mask_and_parameter(target: MaskTarget) -> tuple[WeightMask, nn.Parameter]:
    over: Any = target.module.parametrizations[target.parameter_name]  # type: ignore[index]
    return over[0], over.original


def _replace(target: MaskTarget, weight: Tensor) -> None:
    """Let the mask of a target stand over another weight."""
    over: Any = target.module.parametrizations[target.parameter_name]  # type: ignore[index]
    over.original = nn.Parameter(weight, requires_grad=False)
