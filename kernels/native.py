"""Find and load the compiled kernels: one shared library with a plain C interface for each `kernels/NAME/cpu.cpp`.

setup.py builds them with the package when there is a C++ compiler; without one the package installs all the same, and what needs a
kernel falls back to torch and says so (`compress doctor` shows why). A library that was built from another version of its source is
not used: it could compute something else than the code around it expects.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  before any kernel is loaded: kernels then share torch's OpenMP threads instead of spinning against them

ISAS = ("scalar", "avx2", "avx512")  # what kernels are compiled for, in rising order; each library takes the best the machine has


@dataclass(frozen=True)
class Native:
    """The library of one kernel, or why there is none. `isa`: the instruction set it chose on this machine, one of `ISAS`."""

    name: str
    library: ctypes.CDLL | None
    reason: str = ""

    @property
    def isa(self) -> str:
        return ISAS[self.library.kernel_isa()] if self.library is not None else "none"


@functools.cache
def native(name: str) -> Native:
    """The compiled kernel `name` ("gumbel", "sparse24"). Never raises: `library` is None and `reason` says why and what to do."""
    folder = Path(__file__).parent / name
    file = folder / ("_cpu" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    if not file.exists():
        return Native(
            name, None, "it was not built: no C++ compiler at installation. Install g++ or clang and install the package again"
        )
    try:
        library = ctypes.CDLL(str(file))
        library.kernel_source.restype = ctypes.c_char_p
        built = library.kernel_source().decode()
    except (OSError, AttributeError) as error:
        return Native(name, None, f"{file} does not load: {error}")
    if built != source_digest(folder):
        return Native(name, None, f"{file.name} was built from another version of its source; install the package again")
    return Native(name, library)


def source_digest(folder: Path) -> str:
    """What a library is stamped with: the first 16 hex digits of the SHA-256 of its C++ files, in the order of their names."""
    files = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def use_isa(name: str, isa: str) -> str:
    """Restrict a kernel to an instruction set (one of `ISAS`), for tests and comparisons; what the machine lacks is not exceeded.

    Returns the one in use now. Raises ValueError when the kernel is not built.
    """
    found = native(name)
    if found.library is None:
        raise ValueError(f"kernel {name}: {found.reason}")
    found.library.kernel_use_isa(ISAS.index(isa))
    return found.isa
