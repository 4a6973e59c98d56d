#!/usr/bin/env bash
# All checks: style, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ruff check .
ruff format --check .
mypy
# One worker a core and one thread a worker: tiny models gain nothing from more threads.
OMP_NUM_THREADS=1 python -m pytest -n "$(nproc)" "$@"
