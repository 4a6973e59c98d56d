"""The packed 2:4 format: dense `[N, K]` with at most two non-zeros in every group of four along K <-> kept values and 4-bit codes.

Of each group two values are stored, at the positions idx0 < idx1 that its code `idx0 | idx1 << 2` names. Two codes share a byte, the
group of the lower columns in the low nibble, rows one after the other; when K/4 is odd, the high nibble of a row's last byte is zero.
This is the metadata of the PTX instruction `mma.sp` in its plain order. A group with fewer than two non-zeros keeps positions that are
zero, the same ones that torch's packer takes, so that every code is one of the six legal ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
LEGAL_CODES = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)

_INVALID = 255
# Non-zeros of a group, bit i for position i -> its code. One non-zero or none: filled up as torch does.
_CODE_OF_PATTERN = (0xE, 0x8, 0x9, 0x4, 0xE, 0x8, 0x9, _INVALID, 0xE, 0xC, 0xD, _INVALID, 0xE, _INVALID, _INVALID, _INVALID)
_CHUNK = 1 << 24  # weights at once: intermediates take about ten bytes a weight


class Packed24(NamedTuple):
    """A packed matrix `[N, K]`.

    `values` `[N, K/2]` in one of `VALUE_DTYPES`; `meta` uint8 `[N, ceil(K/8)]`; `scale` fp32 `[N]` with int8 values and None
    otherwise: a weight is value * scale of its row.
    """

    values: Tensor
    meta: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the dense matrix."""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of values, metadata and scale together."""
        return self.values.nbytes + self.meta.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def to(self, device: torch.device | str) -> Packed24:
        """The same matrix on another device."""
        return Packed24(self.values.to(device), self.meta.to(device), None if self.scale is None else self.scale.to(device))


def pack(weight: Tensor, value_dtype: torch.dtype | None = None) -> Packed24:
    """Pack a dense floating-point `[N, K]`, K a multiple of 4, on its device.

    `value_dtype`: one of `VALUE_DTYPES`, by default the weight's own. int8 is symmetric with one scale a row, max|w| / 127.
    NaN counts as non-zero, -0.0 as zero. Raises ValueError, naming the first row and group, when a group has more than two
    non-zeros, and when the weight cannot be held in `value_dtype` (overflow of fp16, NaN or infinity in int8).
    """
    if weight.dim() != 2 or weight.shape[1] % 4 or not weight.is_floating_point():
        raise ValueError(f"a 2:4 matrix is floating point [N, K] with K a multiple of 4, not {weight.dtype} {list(weight.shape)}")
    value_dtype = value_dtype or weight.dtype
    if value_dtype not in VALUE_DTYPES:
        raise ValueError(f"values are stored as {', '.join(map(str, VALUE_DTYPES))}, not {value_dtype}")
    rows, columns = weight.shape
    values = torch.empty(rows, columns // 2, dtype=value_dtype, device=weight.device)
    meta = torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device) if value_dtype == torch.int8 else None
    step = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        kept, codes = _kept(weight[part].detach(), first)
        values[part], row_scale = _as_values(kept, value_dtype, first)
        meta[part] = pack_codes(codes)
        if scale is not None:
            scale[part] = row_scale
    return Packed24(values, meta, scale)


def unpack(packed: Packed24, dtype: torch.dtype | None = None) -> Tensor:
    """Dense `[N, K]` of a packed matrix, in `dtype`: by default that of the values, and fp32 for int8 values, times their scale.

    Raises ValueError when a code is not legal or the shapes do not fit together.
    """
    check(packed)
    return expand(packed, dtype)


def expand(packed: Packed24, dtype: torch.dtype | None = None) -> Tensor:
    """`unpack` of a matrix known to be legal: nothing is looked at, so that it can be traced and a GPU is not waited for."""
    values, meta, scale = packed
    rows, columns = packed.shape
    dtype = dtype or (torch.float32 if scale is not None else values.dtype)
    dense = torch.zeros(rows, columns // 4, 4, dtype=dtype, device=values.device)
    step = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        kept = values[part] if scale is None else values[part].float() * scale[part, None]
        dense[part].scatter_(2, positions(meta[part], columns), kept.to(dtype).view(-1, columns // 4, 2))
    return dense.view(rows, columns)


def check(packed: Packed24) -> None:
    """Raise ValueError, with the place, unless shapes, dtypes and every code of a packed matrix are legal."""
    values, meta, scale = packed
    if values.dim() != 2 or values.shape[1] % 2 or values.dtype not in VALUE_DTYPES:
        raise ValueError(f"packed 2:4 values are [N, K/2] with K a multiple of 4, not {values.dtype} {list(values.shape)}")
    rows, columns = packed.shape
    if meta.dtype != torch.uint8 or tuple(meta.shape) != (rows, (columns + 7) // 8):
        raise ValueError(
            f"metadata of a {rows} x {columns} matrix is uint8 {[rows, (columns + 7) // 8]}, not {meta.dtype} {list(meta.shape)}"
        )
    if (scale is not None) != (values.dtype == torch.int8):
        raise ValueError("packed 2:4 values have a scale if, and only if, they are int8")
    if scale is not None and (scale.dtype != torch.float32 or tuple(scale.shape) != (rows,)):
        raise ValueError(f"the scale of a matrix of {rows} rows is float32 [{rows}], not {scale.dtype} {list(scale.shape)}")
    legal = torch.zeros(16, dtype=torch.bool, device=meta.device)
    legal[list(LEGAL_CODES)] = True
    whole = (columns // 4) // 2  # bytes that hold two codes
    bad = ~(legal[(meta[:, :whole] & 15).int()] & legal[(meta[:, :whole] >> 4).int()])
    if columns % 8:
        bad = torch.cat([bad, ~((meta[:, whole:] < 16) & legal[(meta[:, whole:] & 15).int()])], dim=1)
    if bad.any():
        row, byte = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"row {row}: metadata byte {byte} is {int(meta[row, byte]):#04x}, which holds a code that is not legal 2:4 metadata"
        )


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes `[N, K/4]` -> metadata bytes `[N, ceil(K/8)]`."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def positions(meta: Tensor, columns: int) -> Tensor:
    """Metadata bytes `[N, ceil(K/8)]` -> positions of the two kept values of each group, int64 `[N, K/4, 2]`."""
    codes = torch.stack([meta & 15, meta >> 4], dim=2).view(len(meta), 2 * meta.shape[1])[:, : columns // 4]
    return torch.stack([codes & 3, codes >> 2], dim=2).long()


def _kept(weight: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """The kept values `[n, K/2]` and codes `[n, K/4]` of some rows."""
    groups = weight.reshape(len(weight), -1, 4)  # [n, K/4, 4]
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
    pattern = ((groups != 0).to(torch.uint8) * bits).sum(2, dtype=torch.uint8)
    codes = torch.tensor(_CODE_OF_PATTERN, dtype=torch.uint8, device=weight.device)[pattern.int()]
    bad = codes == _INVALID
    if bad.any():
        row, group = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"not a 2:4 matrix: row {first_row + row}, group {group} (columns {4 * group} to {4 * group + 3}) has more than two non-zeros: "
            f"{groups[row, group].tolist()}; {int(bad.sum())} such groups in rows {first_row} to {first_row + len(weight) - 1}"
        )
    index = torch.stack([codes & 3, codes >> 2], dim=2).long()
    return groups.gather(2, index).view(len(weight), -1), codes


def _as_values(kept: Tensor, dtype: torch.dtype, first_row: int) -> tuple[Tensor, Tensor | None]:
    """Kept values in their storage type, with the rows' scales for int8."""
    if dtype != torch.int8:
        values = kept.to(dtype)
        lost = (values.isinf() & ~kept.isinf()).any(1)
        if lost.any():
            raise ValueError(
                f"row {first_row + int(lost.nonzero()[0])} has a weight beyond the range of {dtype}; pack as bfloat16 or float32"
            )
        return values, None
    return to_int8(kept, first_row)


def to_int8(rows: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Rows `[n, K]` of any floating dtype as int8 `[n, K]` and float32 scales `[n]`, max|row| / 127, to nearest.

    first_row: their place in the matrix, for the message of the ValueError that a NaN or an infinity raises.
    """
    rows = rows.float()
    if not rows.isfinite().all():
        row = first_row + int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"row {row} has a NaN or an infinity, which int8 cannot hold; pack as bfloat16 or float32")
    scale = rows.abs().amax(1) / 127 if rows.shape[1] else rows.new_zeros(len(rows))
    values = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return values, scale
