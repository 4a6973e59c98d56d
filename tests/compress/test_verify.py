"""Verification: what is right passes, and one wrong bit anywhere is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_configs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import UsageError, VerificationError
from compress.export.dense import export_dense
from compress.models import LoadedModel, load_model
from compress.verify import Report, verify_against, verify_checkpoint, verify_masks
from compress.weights import by_parameter, find_weights
from maskllm.patterns import Pattern
from maskllm.storage import MaskFile, load_masks, save_masks

P24 = Pattern(2, 4)
UP = "model.layers.1.mlp.up_proj.weight"


@dataclass
class Case:
    loaded: LoadedModel
    masks: MaskFile
    out: Path
    mask_path: Path

    def against(self, folder: Path) -> Report:
        return verify_against(folder, self.masks.masks, self.loaded, pattern=P24, contracted=self.masks.contracted)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = {}
    for name in ("llama", "gpt2", "mixtral"):
        folder = tmp_path_factory.mktemp(name)
        getattr(tiny_configs, name)().save_pretrained(folder / "source")
        loaded = load_model(str(folder / "source"), tokenizer=False)
        generator = torch.Generator().manual_seed(1)
        masks, dims = {}, {}
        for parameter in by_parameter(find_weights(loaded.model)):
            value, dim = loaded.model.get_parameter(parameter.name), parameter.contracted_dim
            score = torch.rand(value.shape, generator=generator).movedim(dim, -1)
            masks[parameter.name], dims[parameter.name] = P24.best_of(score).movedim(-1, dim).contiguous(), dim
        save_masks(folder / "mask.safetensors", masks, P24, dims, {})
        export_dense(loaded, masks, folder / "out", pattern=P24, contracted=dims)
        made[name] = Case(loaded, load_masks(folder / "mask.safetensors"), folder / "out", folder / "mask.safetensors")
    return made


def altered(
    case: Case, folder: Path, name: str, change: Tensor | None = None, *, at: tuple[int, ...] = (), to: float = 0
) -> Path:
    """A copy of the export with one tensor replaced, or one element of it."""
    shutil.copytree(case.out, folder)
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        tensors[name] = change
    else:
        tensors[name][at] = to
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def failing(report: Report) -> list[str]:
    return [row.name for row in report.rows if not row.ok]


@pytest.mark.parametrize(("name", "matrices"), [("llama", 14), ("gpt2", 8), ("mixtral", 2 * (4 + 3 * 4))])
def test_a_true_export_passes_every_check(cases: dict[str, Case], name: str, matrices: int) -> None:
    case = cases[name]
    for report in (verify_checkpoint(case.out), verify_checkpoint(case.out, masks=case.masks)):
        assert report.ok
        assert len(report.rows) == matrices  # as stored: every expert of its own
        assert sum(row.groups for row in report.rows) == sum(mask.numel() // 4 for mask in case.masks.masks.values())
    against = case.against(case.out)
    assert against.ok
    assert {row.name for row in against.rows} == set(case.loaded.model.state_dict())
    assert verify_masks(case.masks).ok


def first(mask: Tensor, value: bool) -> tuple[int, ...]:
    return tuple(int(i) for i in (mask == value).nonzero()[0])


def test_one_weight_too_many(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["llama"]
    folder = altered(case, tmp_path / "bad", UP, at=first(case.masks.masks[UP], False), to=1e-30)
    for report in (verify_checkpoint(folder), verify_checkpoint(folder, masks=case.masks), case.against(folder)):
        assert failing(report) == [UP]
        with pytest.raises(VerificationError, match="up_proj"):
            report.raise_if_bad()
    assert [row.bad_groups for row in verify_checkpoint(folder).rows if not row.ok] == [1]


def test_a_pattern_that_is_not_the_masks(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["llama"]
    value = case.loaded.model.get_parameter(UP).detach() * case.masks.masks[UP].roll(1, 0)  # 2:4 as well, another mask
    folder = altered(case, tmp_path / "bad", UP, value)
    assert verify_checkpoint(folder).ok
    report = verify_checkpoint(folder, masks=case.masks)
    assert failing(report) == [UP]
    assert "not zero where the mask drops" in [row.note for row in report.rows]


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "lm_head.weight"])
def test_one_flipped_bit(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    case = cases["llama"]
    value = load_file(case.out / "model.safetensors")[name]
    flat = value.view(torch.int32).flatten()
    at = int(flat.nonzero()[-1])
    flat[at] ^= 1  # the last bit of the mantissa
    folder = altered(case, tmp_path / "bad", name, value)
    assert verify_checkpoint(folder, masks=case.masks).ok  # the zeros are where they were
    report = case.against(folder)
    assert failing(report) == [name]
    assert [row.differing for row in report.rows if not row.ok] == [1]
    assert next(row.max_difference for row in report.rows if not row.ok) > 0


def test_minus_zero_is_not_zero(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["llama"]
    folder = altered(case, tmp_path / "bad", UP, at=first(case.masks.masks[UP], False), to=-0.0)
    assert verify_checkpoint(folder).ok
    assert failing(case.against(folder)) == [UP]


def test_an_expert_is_named_as_the_file_names_it(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["mixtral"]
    name = next(row.name for row in verify_checkpoint(case.out).rows if ".experts.2." in row.name)
    assert name not in case.masks.masks  # in memory the experts are one parameter
    folder = altered(case, tmp_path / "bad", name, torch.ones(load_file(case.out / "model.safetensors")[name].shape))
    assert failing(verify_checkpoint(folder, masks=case.masks)) == [name]
    assert [
        row.name.endswith("experts.gate_up_proj") or "down_proj" in row.name for row in case.against(folder).rows if not row.ok
    ] == [True]


def test_a_missing_tensor(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["llama"]
    shutil.copytree(case.out, tmp_path / "bad")
    tensors = load_file(case.out / "model.safetensors")
    del tensors[UP]
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    assert failing(verify_checkpoint(tmp_path / "bad")) == [UP]
    assert failing(verify_checkpoint(tmp_path / "bad", masks=case.masks)) == [UP]
    assert UP in failing(case.against(tmp_path / "bad"))  # transformers fills it with random numbers


def test_a_checkpoint_that_says_nothing_of_itself(cases: dict[str, Case], tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(cases["mixtral"].out, folder)
    (folder / "compress.json").unlink()
    with pytest.raises(UsageError, match="--pattern"):
        verify_checkpoint(folder)
    report = verify_checkpoint(folder, P24)  # routers are dense, and are not asked
    assert report.ok
    assert len(report.rows) == 32
    assert len(failing(verify_checkpoint(folder, Pattern(1, 4)))) == 32
    assert len(verify_checkpoint(folder, P24, include=("*q_proj*",), exclude=("*.0.*",)).rows) == 1
    with pytest.raises(UsageError, match="no matrix"):
        verify_checkpoint(folder, P24, include=("*.nothing.*",))
    # A pattern whose groups do not fit fails, rather than being passed over.
    assert not verify_checkpoint(folder, Pattern(2, 5)).ok


def test_groups_along_the_other_dimension_are_told(cases: dict[str, Case], tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(cases["gpt2"].out, folder)
    (folder / "compress.json").unlink()
    assert verify_checkpoint(folder, P24, dim=-2).ok
    report = verify_checkpoint(folder, P24)
    assert len(failing(report)) == 8
    assert {row.note for row in report.rows} == {"it is 2:4 along dimension -2"}


def test_a_dense_model_fails(cases: dict[str, Case]) -> None:
    case = cases["llama"]
    assert case.loaded.folder is not None
    assert len(failing(verify_checkpoint(case.loaded.folder, P24))) == 14
    assert set(failing(case.against(case.loaded.folder))) == set(case.masks.masks)


def test_masks_of_another_model(cases: dict[str, Case]) -> None:
    with pytest.raises(UsageError, match="does not have"):
        verify_against(cases["llama"].out, cases["gpt2"].masks.masks, cases["llama"].loaded)


def test_a_folder_that_does_not_load(cases: dict[str, Case], tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="does not load"):
        cases["llama"].against(tmp_path)


def test_a_damaged_mask_file(cases: dict[str, Case], tmp_path: Path) -> None:
    packed = load_file(cases["llama"].mask_path)
    with safe_open(cases["llama"].mask_path, framework="pt") as file:
        header = file.metadata()
    packed[UP][5] = 255
    save_file(packed, tmp_path / "mask.safetensors", header)
    report = verify_masks(load_masks(tmp_path / "mask.safetensors"))
    assert failing(report) == [UP]


def test_command_and_exit_code(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["llama"]
    source = case.loaded.source
    good = CliRunner().invoke(app, ["verify", str(case.out), "--mask", str(case.mask_path), "--original", source, "--json"])
    assert good.exit_code == 0, good.output
    facts = json.loads(good.stdout)
    assert facts["ok"] is True
    assert [report["tensors"] for report in facts["reports"]] == [14, len(case.loaded.model.state_dict())]
    assert CliRunner().invoke(app, ["verify", str(case.mask_path)]).exit_code == 0
    assert isinstance(CliRunner().invoke(app, ["verify", str(case.out), "--original", source]).exception, UsageError)
    folder = altered(case, tmp_path / "bad", UP, at=first(case.masks.masks[UP], False), to=1.0)
    bad = subprocess.run([sys.executable, "-m", "compress", "verify", str(folder), "--json"], capture_output=True, text=True)
    assert bad.returncode == 3
    assert json.loads(bad.stdout)["reports"][0]["failed"][0]["name"] == UP
    assert bad.stderr.startswith("error: ")
    assert "up_proj" in bad.stderr
