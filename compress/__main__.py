"""`python -m compress`, and the entry point of the `compress` command."""

from __future__ import annotations

from compress.cli import main

if __name__ == "__main__":
    main()
