"""Codes as dense bits, and the tensors of compressed-tensors' `pack-quantized` format.

Both are one stream of bits a row: code i of b bits takes bits `i * b` to `i * b + b - 1`, least significant bit first, and may
straddle bytes. So eight codes fill exactly b bytes at every width, three bits included. `pack` ends a row at a full byte;
compressed-tensors ends it at a full little-endian 32-bit word, and is the same bytes otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CompressError, UsageError
from compress.quantize.grid import Grid, Quantized


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., K]`, each below `2^bits`, as uint8 `[..., ceil(K * bits / 8)]`; the bits left over are 0.

    bits: 1 to 8. Raises CompressError for codes of another dtype or too large, UsageError for another width.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise CompressError(f"codes are uint8; these are {codes.dtype}")
    columns = codes.shape[-1]
    if codes.numel() and int(codes.max()) >> bits:
        raise CompressError(f"the code {int(codes.max())} does not fit into {bits} bits")
    eights = functional.pad(codes, (0, -columns % 8)).unflatten(-1, (-1, 8))
    word = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)  # eight codes: 8 * bits <= 64 bits
    for i in range(8):
        word |= eights[..., i].long() << (bits * i)
    packed = torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], dim=-1).to(torch.uint8)
    return packed.flatten(-2)[..., : packed_bytes(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 `[..., ceil(columns * bits / 8)]` -> uint8 codes `[..., columns]`.

    Raises CompressError when the size does not fit `columns`.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_bytes(columns, bits):
        raise CompressError(
            f"{columns} codes of {bits} bits take {packed_bytes(columns, bits)} bytes (uint8); "
            f"this is {packed.dtype} of {packed.shape[-1]}"
        )
    groups = -(-columns // 8)
    padded = functional.pad(packed, (0, groups * bits - packed.shape[-1])).unflatten(-1, (groups, bits))
    word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= padded[..., i].long() << (8 * i)
    codes = torch.stack([(word >> (bits * i)) & ((1 << bits) - 1) for i in range(8)], dim=-1)
    return codes.to(torch.uint8).flatten(-2)[..., :columns].contiguous()


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one row of `columns` codes."""
    return (columns * bits + 7) // 8


def to_compressed_tensors(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one weight in `pack-quantized` (compressed-tensors 0.18 to 0.20), by the suffix of their key.

    `weight_packed` int32 `[N, ceil(K * bits / 32)]`; `weight_scale` `[N, K / group_size]`, the grid's dtype; `weight_shape` int64
    `[2]`; for an asymmetric grid `weight_zero_point` int32 `[ceil(N * bits / 32), K / group_size]`, packed along N. The format
    counts codes from -2^(bits-1) and stores them with that offset added, which is how codes and zeros are kept here.

    Raises UsageError for grids that the format does not know (float and midrise) and for a group size that does not divide K.
    """
    grid, (rows, columns) = quantized.grid, quantized.codes.shape
    if not grid.has_zero:
        raise UsageError(f"compressed-tensors stores symmetric and asymmetric grids; this one is {grid.kind}")
    if columns % grid.group_size:
        raise UsageError(f"compressed-tensors needs whole groups: {grid.group_size} does not divide the {columns} inputs")
    tensors = {
        "weight_packed": _words(quantized.codes, grid.bits),
        "weight_scale": quantized.scale.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if quantized.zero is not None:
        tensors["weight_zero_point"] = _words(quantized.zero.T, grid.bits).T.contiguous()
    return tensors


def from_compressed_tensors(tensors: dict[str, Tensor], bits: int, group_size: int) -> Quantized:
    """The inverse of `to_compressed_tensors`. Raises CompressError for tensors of other sizes or types."""
    rows, columns = (int(size) for size in tensors["weight_shape"])
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    grid = Grid(bits, group_size, "symmetric" if zero is None else "asymmetric", scale.dtype)
    if scale.shape != (rows, grid.groups(columns)):
        raise CompressError(f"weight_scale is {list(scale.shape)}; it should be {[rows, grid.groups(columns)]}")
    codes = _codes(tensors["weight_packed"], bits, columns)
    if len(codes) != rows:
        raise CompressError(f"weight_packed has {len(codes)} rows; weight_shape says {rows}")
    if zero is not None:
        zero = _codes(zero.T, bits, rows).T.contiguous()
        if zero.shape != scale.shape:
            raise CompressError(f"weight_zero_point holds {list(zero.shape)} zeros for {list(scale.shape)} scales")
    return Quantized(codes, scale, zero, grid)


def _words(codes: Tensor, bits: int) -> Tensor:
    """`pack`, filled up to little-endian int32 words: `[N, K]` -> `[N, ceil(K * bits / 32)]`."""
    packed = pack(codes, bits)
    four = functional.pad(packed, (0, -packed.shape[-1] % 4)).unflatten(-1, (-1, 4)).long()
    word = four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16 | four[..., 3] << 24
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _codes(words: Tensor, bits: int, columns: int) -> Tensor:
    if words.dtype != torch.int32 or words.shape[-1] != -(-columns * bits // 32):
        raise CompressError(
            f"{columns} codes of {bits} bits take {-(-columns * bits // 32)} int32 words; this is {words.dtype} of {words.shape[-1]}"
        )
    packed = torch.stack([(words.long() >> (8 * i)) & 255 for i in range(4)], dim=-1).to(torch.uint8).flatten(-2)
    return unpack(packed[..., : packed_bytes(columns, bits)], bits, columns)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UsageError(f"codes have 1 to 8 bits, not {bits}")
