"""`compress verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.errors import UsageError


def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint folder, or a mask file.")],
    pattern: Annotated[str | None, typer.Option("--pattern", help="N:M. Default: what the checkpoint says of itself.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="Mask file that the checkpoint should follow.")] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="The dense model: prove the checkpoint is mask times original, bit for bit.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Glob of tensors to check; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Glob of tensors to pass over; may be repeated.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Prove that a checkpoint has its N:M pattern, and that it equals mask times original.

    Exits with 3 when the proof fails.

    **Examples**

    - `compress verify my-sparse-model`
    - `compress verify my-packed-model`
    - `compress verify some-model --pattern 2:4`
    - `compress verify my-sparse-model --mask runs/quickstart/mask.safetensors --original asset:tiny-llama`
    """
    from compress.checkpoint import read_header
    from compress.packed import is_packed
    from compress.packed_moe import is_packed_moe
    from compress.verify import verify_against, verify_checkpoint, verify_masks
    from compress.verify_packed import verify_packed, verify_packed_against
    from compress.verify_packed_moe import verify_packed_moe
    from maskllm.patterns import Pattern
    from maskllm.storage import FORMAT, load_masks

    for given in (path, mask):
        if given is not None and not given.exists():
            raise UsageError(f"{given}: there is no such file or folder")
    if original and mask is None:
        raise UsageError("--original needs --mask: which weights should be there?")
    wanted = Pattern.parse(pattern) if pattern else None
    if path.is_file() and read_header(path)[0].get("format") == FORMAT:
        if mask or original:
            raise UsageError(f"{path} is a mask file itself; --mask and --original go with a checkpoint folder")
        reports = [verify_masks(load_masks(path))]
    elif path.is_dir() and is_packed_moe(path):
        if mask or pattern:
            raise UsageError(f"{path} is quantised; --pattern, --mask and --original go with sparse checkpoints")
        reports = [verify_packed_moe(path, include=include or ["*"], exclude=exclude or [])]
    else:
        masks = load_masks(mask) if mask else None
        packed = path.is_dir() and is_packed(path)
        check = verify_packed if packed else verify_checkpoint
        reports = [check(path, wanted, masks=masks, include=include or ["*"], exclude=exclude or [])]
        if original and masks:
            from compress.models import load_model

            dense = load_model(original, tokenizer=False)
            reports.append(
                verify_packed_against(path, masks.masks, dense)
                if packed
                else verify_against(path, masks.masks, dense, pattern=masks.pattern, contracted=masks.contracted)
            )
    if json_:
        facts = {"path": str(path), "ok": all(report.ok for report in reports), "reports": [_summary(r) for r in reports]}
        typer.echo(json.dumps(facts))
    for report in reports:
        report.raise_if_bad()
        if not json_:
            groups = sum(row.groups for row in report.rows)
            counted = f", {groups:,} groups" if groups else ""
            typer.echo(f"verified: {report.claim} ({len(report.rows)} tensors{counted})")


def _summary(report: object) -> dict[str, object]:
    from compress.verify import Report

    assert isinstance(report, Report)
    return {
        "claim": report.claim,
        "ok": report.ok,
        "pattern": report.pattern,
        "tensors": len(report.rows),
        "groups": sum(row.groups for row in report.rows),
        "failed": [vars(row) for row in report.rows if not row.ok],
    }
