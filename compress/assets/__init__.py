"""What is shipped inside the package, so that everything can be tried without a network: two tiny models and four texts.

An asset is named `asset:NAME` wherever a model or a text is asked for. The licence of each text lies beside it as `LICENSE.md`.
`asset:python` is not shipped: it stands for the source code of the standard library of the Python that runs.
"""

from __future__ import annotations

import difflib
import sysconfig
from pathlib import Path

from compress.errors import CompressError, UsageError

PREFIX = "asset:"

# name -> place below this folder
ASSETS: dict[str, str] = {
    "tiny-llama": "models/tiny-llama",
    "tiny-moe": "models/tiny-moe",
    "wikitext2-test": "text/wikitext2/test.txt",
    "wikitext2-valid": "text/wikitext2/valid.txt",
    "wikipedia": "text/wikipedia/wikipedia.txt",
    "pubmed": "text/pubmed/pubmed.txt",
}
PYTHON = PREFIX + "python"
MODELS: tuple[str, ...] = tuple(name for name, place in ASSETS.items() if place.startswith("models/"))
TEXTS: tuple[str, ...] = tuple(name for name, place in ASSETS.items() if place.startswith("text/"))

_ROOT = Path(__file__).resolve().parent


def is_asset(source: str) -> bool:
    """Whether `source` is written as `asset:NAME`."""
    return source.startswith(PREFIX)


def asset_path(name: str) -> Path:
    """The folder (model) or file (text) of an asset; `name` with or without `asset:` in front.

    Raises UsageError for an unknown name, with the closest known one, and CompressError when the installation lacks the files.
    """
    name = name.removeprefix(PREFIX)
    if name not in ASSETS:
        close = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"did you mean '{PREFIX}{close[0]}'? " if close else ""
        raise UsageError(f"there is no asset '{name}'; {hint}the assets are {', '.join(ASSETS)} and, as a text, python")
    path = _ROOT / ASSETS[name]
    if not path.exists():
        raise CompressError(
            f"asset '{name}' is missing from this installation ({path} does not exist); install the package again"
        )
    return path


def python_files() -> list[Path]:
    """The modules of the standard library that are one file (about 170, 4.7 MB): text of a domain that every machine has, sorted by name.

    They differ a little between versions of Python, so results on them compare only where the version is the same.
    """
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
