"""Builds the compiled kernels with the package where there is a C++ compiler; everything else is in pyproject.toml.

Each `kernels/NAME/cpu.cpp` becomes `compress_kernels/NAME/_cpu*.so`, a library with a plain C interface that `kernels/native.py` loads.
No `-march`: a file holds its own versions for AVX-512, AVX2 and plain C++, and chooses at load.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


def kernel(source: Path) -> Extension:
    files = sorted([*source.parent.glob("*.cpp"), *source.parent.glob("*.h")])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]  # as kernels/native.py makes it
    return Extension(
        f"compress_kernels.{source.parent.name}._cpu",
        [source.relative_to(HERE).as_posix()],
        define_macros=[("KERNEL_SOURCE", f'"{digest}"')],
        extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"],
        extra_link_args=["-fopenmp"],
        depends=[file.relative_to(HERE).as_posix() for file in files],
        optional=True,
    )


class BuildLibraries(build_ext):
    """The libraries are loaded by ctypes, so they have no PyInit function to export."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # a library older than one of its headers would be refused at load

    def get_export_symbols(self, ext):
        return ext.export_symbols


setup(ext_modules=[kernel(path) for path in sorted(HERE.glob("kernels/*/cpu.cpp"))], cmdclass={"build_ext": BuildLibraries})
