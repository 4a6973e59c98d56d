"""Say so when torch computes what a compiled kernel should: the result is the same, the time is not."""

from __future__ import annotations

from functools import cache

from compress import console
from compress_kernels.native import native


@cache
def tell_missing(*names: str) -> None:
    """One line on stderr for each of these kernels that is not there, once a process."""
    for name in names:
        found = native(name)
        if found.library is None:
            console.log.print(
                f"[yellow]kernel {name} is not available, torch does its work, slower: {found.reason}[/]", soft_wrap=True
            )
