"""A kernel that is not there is told of, once."""

from __future__ import annotations

import pytest

from compress import fallback
from compress_kernels.native import Native


@pytest.mark.parametrize("library", [None, object()])
def test_a_missing_kernel_is_told_once_and_why(library, monkeypatch, capsys):
    monkeypatch.setattr(fallback, "native", lambda name: Native(name, library, "no compiler at installation"))
    fallback.tell_missing.cache_clear()
    for _ in range(2):
        fallback.tell_missing("sparse24")
    fallback.tell_missing.cache_clear()
    said = capsys.readouterr().err
    assert said.count("sparse24") == (library is None)
    assert ("no compiler at installation" in said) == (library is None)
