"""Run a file of tests in Triton's interpreter: it must be chosen before triton is imported, so in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def run_interpreted(name: str) -> None:
    """Run `interpreted_NAME.py` beside this file; fails with its output when a test of it does, or when it has none."""
    file = Path(__file__).with_name(f"interpreted_{name}.py")
    command = [sys.executable, "-m", "pytest", str(file), "-n0", "-p", "no:cacheprovider"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-2000:]
