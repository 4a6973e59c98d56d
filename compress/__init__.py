"""Make large language models smaller, then run them smaller.

This import stays light: torch and transformers are loaded by the modules that need them.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # compress.load(folder): the model of a packed checkpoint
        from compress.runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
