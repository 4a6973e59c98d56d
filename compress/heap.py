"""Memory of the process as the system sees it: how much it holds, the most it held, and giving back what was freed.

The C library keeps freed blocks below 32 MiB, of which a stage of a run leaves hundreds of megabytes, in pieces that the next stage can use
only in part. `give_back` returns them to the system between stages.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path


def resident() -> int:
    """Bytes of memory that this process holds now; where the system does not say, the most it ever held."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """The most that this process held, in bytes: since `restart_peak`, or ever."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or most * (1 if sys.platform == "darwin" else 1024)


def restart_peak() -> bool:
    """Let `peak` count from now. False where the system cannot (only Linux can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc)."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)
