"""`compress allocate-bits` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import UsageError

RUNNER = CliRunner()


def compress(*args: object) -> str:
    result = RUNNER.invoke(app, ["allocate-bits", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def statistics(layers: int = 3, experts: int = 8) -> dict[str, Any]:
    random = np.random.default_rng(0)
    loss = random.lognormal(0, 1, (layers, experts, 1)) * np.array([1.0, 0.6, 0.2])
    return {
        "bits": [1, 2, 3],
        "frequency": {str(2 * i): row for i, row in enumerate(random.integers(1, 99, (layers, experts)).tolist())},
        "weight": {str(2 * i): row for i, row in enumerate(random.random((layers, experts)).tolist())},
        "quant_loss": {str(2 * i): row for i, row in enumerate(loss.tolist())},
    }


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(statistics()))
    return file


@pytest.fixture
def sized(tmp_path: Path) -> Path:
    sizes = {"expert_shapes": [[128, 256], [256, 128]], "zero_bits": 16, "other_weights": 100_000, "other_bytes": 200_000}
    file = tmp_path / "sized.json"
    file.write_text(json.dumps({**statistics(), **sizes}))
    return file


def test_json_holds_the_allocation_and_its_certificate(stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "bits.json"
    found = json.loads(compress("--stats", stats, "--average-bits", 2.5, "--json", "--out", out))
    assert json.loads(out.read_text()) == found
    assert list(found["layers"]) == ["0", "2", "4"]
    for widths in found["layers"].values():
        assert len(widths) == 8
        assert sum(widths) <= 20
        assert {2, 3} <= set(widths) <= {1, 2, 3}
    assert found["mode"] == "pmq"
    assert found["exponents"] == [1, 1.5, 1]
    assert found["gap"] == pytest.approx(0, abs=1e-9)
    assert found["bound"] <= found["objective"] * (1 + 1e-12)
    assert found["average_bits"] == sum(map(sum, found["layers"].values())) / 24
    assert found["nbytes"] is None
    assert found["seconds"] > 0
    assert not list(tmp_path.glob("*.partial"))


def test_options_reach_the_programme(stats: Path) -> None:
    common = ("--stats", stats, "--average-bits", 2.1, "--json")
    found = json.loads(
        compress(
            *common, "--mode", "error", "--floor", "layers.4.*=2", "--ceiling", "*.experts.7=2", "--protect", "layers.0.experts.1"
        )
    )
    assert min(found["layers"]["4"]) == 2
    assert max(widths[7] for widths in found["layers"].values()) <= 2
    assert found["layers"]["0"][1] == 3
    by_highs = json.loads(compress(*common, "--mode", "error", "--solver", "highs"))
    assert by_highs["method"].startswith("HiGHS")
    assert by_highs["objective"] == pytest.approx(json.loads(compress(*common, "--mode", "error"))["objective"])
    two = json.loads(compress(*common, "--bits", "1,3"))
    assert {b for widths in two["layers"].values() for b in widths} == {1, 3}
    paper = json.loads(compress(*common, "--pmq-exponents", "1,1,2"))
    assert paper["exponents"] == [1, 1, 2]
    assert paper["objective"] != json.loads(compress(*common))["objective"]


def test_budgets_in_bytes(sized: Path) -> None:
    # By hand: with fp16 scales and zero points for 128 weights an expert of 65,536 weights at b bits takes 8192 b + 2048 bytes.
    found = json.loads(compress("--stats", sized, "--max-bytes", 24 * 18_432 + 5_000, "--mode", "error", "--json"))
    widths = [b for layer in found["layers"].values() for b in layer]
    assert found["nbytes"] == sum(8192 * b + 2048 for b in widths) == 24 * 18_432
    assert found["bits_per_weight"] == 2.25
    whole = json.loads(compress("--stats", sized, "--bits-per-weight", 3, "--mode", "error", "--json"))
    assert whole["model_bits_per_weight"] == pytest.approx(8 * (whole["nbytes"] + 200_000) / (24 * 65_536 + 100_000))
    assert 2.9 < whole["model_bits_per_weight"] <= 3


def test_table_shows_widths_histogram_and_bound(sized: Path) -> None:
    text = compress("--stats", sized, "--average-bits", 2)
    made = json.loads(compress("--stats", sized, "--average-bits", 2, "--json"))
    for index, widths in made["layers"].items():
        assert any(row.split("│")[1:3] == [f" {index:5} ", f" {''.join(map(str, widths)):19} "] for row in text.splitlines())
    for words in ("3-bit experts", "█", "proven lower bound", "0, optimal", "bits per expert weight", "whole model", "solved by"):
        assert words in text


def test_large_layers_are_summed_up(tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(statistics(2, 100)))
    assert "bits of its experts" not in compress("--stats", file, "--average-bits", 2)


def test_curve_as_json_and_as_a_picture(stats: Path, tmp_path: Path) -> None:
    compress("--stats", stats, "--mode", "error", "--curve", tmp_path / "curve.json")
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["mode"] == "error"
    assert set(curve["series"]) == {"error", "pmq", "uniform"}
    assert [len(curve["series"][name]) for name in ("error", "pmq", "uniform")] == [20, 20, 3]
    stdout = compress("--stats", stats, "--average-bits", 2, "--json", "--curve", tmp_path / "curve.png")
    assert json.loads(stdout)["mode"] == "pmq"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["curve.json", "curve.png", "stats.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one budget"),
        (["--average-bits", 2, "--max-bytes", 100], "give one budget"),
        (
            ["--average-bits", 1.2],
            r"layer 0: a budget of 1\.2 average bits is too small: the smallest possible is 1\.375 average bits",
        ),
        (["--average-bits", 2, "--bits", "1,x"], "must be widths like 1,2,3"),
        (["--average-bits", 2, "--bits", "1,4"], "no loss was measured at 4 bits"),
        (["--average-bits", 2, "--mode", "fisher"], "mode fisher needs fisher"),
        (["--max-bytes", 1000, "--mode", "error"], "needs the bytes of every candidate"),
        (["--average-bits", 2, "--floor", "layers.0.*"], "is not GLOB=BITS"),
        (["--average-bits", 2, "--floor", "layers.1.*=2"], "matches no unit"),
        (["--average-bits", 2, "--pmq-exponents", "1,2"], "must be three numbers"),
        (["--average-bits", 2, "--curve", "curve.pdf"], r"must end in \.png or \.json"),
        (["--curve", "curve.png", "--json"], "needs a budget"),
        (["--average-bits", 2, "--out", "nowhere/bits.json"], "does not exist"),
    ],
)
def test_faults_are_usage_errors(stats: Path, arguments: list[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress("--stats", stats, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "is not JSON"), ('{"bits": [1]}', "stats.json: there is neither quant_loss nor fisher")],
)
def test_faults_of_the_file_name_it(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "stats.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        compress("--stats", file, "--average-bits", 2)


def test_help_has_examples_and_imports_nothing_heavy() -> None:
    assert "Examples" in compress("--help")
    code = (
        "import sys\nfrom compress.cli import app\n"
        "try: app(['allocate-bits', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_allocation_needs_no_torch() -> None:
    code = "import sys\nimport compress.moe.curve\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
