"""A run directory that a kill left behind: what may start there, and what may go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UsageError
from compress.rundir import RunDir


def test_a_run_killed_before_it_had_its_recipe_can_be_started_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml.partial").write_text("seed: ")
    with pytest.raises(UsageError, match="no run to resume"):
        RunDir.check(out, "seed: 0\n", resume=True)
    RunDir.check(out, "seed: 0\n", resume=False).create("seed: 0\n")
    assert sorted(p.name for p in out.iterdir()) == ["recipe.yaml", "state"]
    assert RunDir.check(out, "seed: 0\n", resume=True).recipe.read_text() == "seed: 0\n"


def test_a_folder_of_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        RunDir.check(tmp_path, "seed: 0\n", resume=False)


def test_a_run_has_its_recipe_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kill in between would leave a folder that is neither empty nor a run."""
    made: list[Path] = []
    plain = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **k: (made.append(self), plain(self, *a, **k))[1])
    out = tmp_path / "run"
    seen = []

    def write(path: Path, text: str) -> None:
        seen.append((path, list(made)))
        path.write_text(text)

    monkeypatch.setattr("compress.rundir.write_atomic", write)
    RunDir(out).create("seed: 0\n")
    assert [path for path, _ in seen] == [out / "recipe.yaml"]
    assert out / "state" not in seen[0][1]
    assert (out / "state").is_dir()
