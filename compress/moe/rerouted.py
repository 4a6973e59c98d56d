"""How many tokens a changed model sends to other experts than the original does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compress.routing.mixtures import call_arguments


class Rerouted:
    """Slots (a token's place among its top k) by mixture: seen, and given to an expert that the original does not choose for the token."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = defaultdict(int)
        self.changed: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, list[list[Tensor]]] = defaultdict(lambda: [[], []])

    @property
    def share(self) -> float:
        """Over all mixtures."""
        return sum(self.changed.values()) / max(1, sum(self.seen.values()))

    def by_mixture(self) -> dict[str, float]:
        """Share of the slots of each mixture."""
        return {name: self.changed[name] / seen for name, seen in self.seen.items()}

    def add(self, name: str, side: int, index: Tensor) -> None:
        """Experts `[T, k]` that one of the two models (0 or 1) chose in its next pass; passes are paired in order."""
        queues = self._waiting[name]
        queues[side].append(index.cpu())
        while queues[0] and queues[1]:
            a, b = queues[0].pop(0), queues[1].pop(0)
            known = (a[:, :, None] == b[:, None, :]).any(-1)
            self.seen[name] += known.numel()
            self.changed[name] += int((~known).sum())


@contextmanager
def comparing(model: nn.Module, original: nn.Module, names: Mapping[str, object] | list[str]) -> Iterator[Rerouted]:
    """While it lasts, compare what the two models choose for the same tokens at the fused mixtures of these names."""
    found = Rerouted()
    handles = []
    for side, owner in enumerate((model, original)):
        for name in names:

            def before(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], side: int = side, name: str = name
            ) -> None:
                found.add(name, side, call_arguments(args, kwargs, name)[1])

            handles.append(owner.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
