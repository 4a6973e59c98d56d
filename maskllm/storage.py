"""Mask files: base-C digits in safetensors (0.667 bit per weight for 2:4), and the `.npz` files that MaskLLM published.

The base-C code. A pattern N:M has C = C(M, N) candidates, so a group is one digit in base C (its candidate index, see
`maskllm.patterns`), and a byte holds the most digits d with C**d <= 256: for 2:4 C = 6, d = 3, since 6**3 = 216. The contracted
dimension is moved last, groups follow in row-major order, the first group of a byte is its least significant digit, and the last
byte is filled up with zero digits. Hence group g is `byte[g // d] // C**(g % d) % C`: any group can be read alone. A pattern with
C > 256 (5:11 and beyond, such as 8:16) takes two bytes a group, little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskllm.errors import MaskError
from maskllm.patterns import Pattern
from maskllm.safefile import Entry, atomic_file, write_safetensors

FORMAT = "maskllm-base-c"
VERSION = "1"
_CHUNK = 1 << 22  # weights handled at a time; bounds the temporaries to some tens of MB


def digits_per_byte(pattern: Pattern) -> int:
    """The largest d with C**d <= 256; at least 1, since no pattern has more than 256 candidates."""
    d = 1
    while pattern.count ** (d + 1) <= 256:
        d += 1
    return d


def packed_size(pattern: Pattern, weights: int) -> int:
    """Bytes of the packed mask of `weights` weights (a multiple of M)."""
    groups, d = weights // pattern.m, digits_per_byte(pattern)
    return -(-groups // d)


def pack_mask(mask: Tensor, pattern: Pattern) -> Tensor:
    """Bool `[..., K]`, contracted dimension last -> uint8 `[bytes]`, on the CPU.

    Raises MaskError unless M divides K and every group keeps exactly N.
    """
    pattern.check_divides(mask.shape[-1], "mask")
    flat = mask.reshape(-1)
    d, m = digits_per_byte(pattern), pattern.m
    packed = torch.empty(packed_size(pattern, flat.numel()), dtype=torch.uint8)
    step = _aligned_chunk(m * d)
    at = bad = 0
    for start in range(0, flat.numel(), step):
        digits = _digits(flat[start : start + step].cpu(), pattern)  # int16 [groups], -1 where not N of M
        bad += int((digits < 0).sum())
        part = _digits_to_bytes(digits, pattern, d)
        packed[at : at + part.numel()] = part
        at += part.numel()
    if bad:
        raise MaskError(f"{bad} of {flat.numel() // m} groups do not keep exactly {pattern.n} of {m} weights")
    return packed


def unpack_mask(packed: Tensor, pattern: Pattern, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_mask`: uint8 `[bytes]` -> bool of `shape` `[..., K]`, contracted dimension last.

    Raises MaskError when the length does not fit the shape, a digit is out of range, or the filling of the last byte is not zero.
    """
    shape = tuple(shape)
    pattern.check_divides(shape[-1], "mask")
    weights, d = prod(shape), digits_per_byte(pattern)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(pattern, weights):
        raise MaskError(
            f"a {pattern} mask of shape {list(shape)} takes {packed_size(pattern, weights)} bytes; "
            f"found {packed.numel()} of {packed.dtype}"
        )
    packed = packed.reshape(-1)
    mask = torch.empty(weights, dtype=torch.bool)
    step = _aligned_chunk(pattern.m * d)
    per_byte = d * pattern.m
    for start in range(0, weights, step):
        stop = min(start + step, weights)
        index = packed[start // per_byte : -(-stop // per_byte)].long()
        if int(index.max()) >= pattern.count**d:
            raise MaskError(f"byte {int(index.max())} is no {d} base-{pattern.count} digits of a {pattern} mask")
        rows = _byte_table(pattern.n, pattern.m)[index].reshape(-1)  # [bytes, d * m] -> [weights]
        mask[start:stop] = rows[: stop - start]
    if weights and int(packed[-1]) >= pattern.count ** ((weights // pattern.m - 1) % d + 1):
        raise MaskError("the filling of the last byte is not zero")
    return mask.reshape(shape)


def _aligned_chunk(unit: int) -> int:
    return max(1, _CHUNK // unit) * unit


def _digits(flat: Tensor, pattern: Pattern) -> Tensor:
    """Candidate index of each group, without its message: bool `[weights]` -> int16 `[groups]`, -1 where the group is no candidate."""
    columns = flat.to(torch.bool).view(torch.uint8).unflatten(0, (-1, pattern.m)).unbind(-1)
    code = columns[0].to(torch.int32 if pattern.m > 8 else torch.uint8)  # bit j: weight j is kept
    for j, column in enumerate(columns[1:], 1):
        code = code | (column.to(code.dtype) << j)
    return _code_table(pattern.n, pattern.m)[code.int()]


def _digits_to_bytes(digits: Tensor, pattern: Pattern, d: int) -> Tensor:
    digits = digits.clamp(min=0)
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % d)).unflatten(0, (-1, d))
    total = digits[:, 0].clone()
    for j in range(1, d):
        total += digits[:, j] * pattern.count**j
    return total.to(torch.uint8)


@cache
def _code_table(n: int, m: int) -> Tensor:
    """Bit code of a group (bit j: weight j is kept) -> candidate index, int16 `[2**m]`, -1 for no candidate."""
    table = torch.full((1 << m,), -1, dtype=torch.int16)
    codes = (Pattern(n, m).candidates() * (1 << torch.arange(m))).sum(-1)
    table[codes] = torch.arange(len(codes), dtype=torch.int16)
    return table


@cache
def _byte_table(n: int, m: int) -> Tensor:
    """Byte -> its groups: bool `[C**d, d * m]`."""
    pattern = Pattern(n, m)
    d = digits_per_byte(pattern)
    byte = torch.arange(pattern.count**d)
    digits = torch.stack([byte // pattern.count**j % pattern.count for j in range(d)], dim=-1)  # [C**d, d]
    return pattern.candidates()[digits].flatten(1)


# The mask file


class _LazyMasks(Mapping[str, Tensor]):
    """Masks of a file, each read and unpacked when asked for, so that a 7B model's masks need not be in memory together."""

    def __init__(self, path: Path, pattern: Pattern, shapes: dict[str, tuple[int, ...]], contracted: dict[str, int]) -> None:
        self.path, self.pattern, self.shapes, self.contracted = path, pattern, shapes, contracted

    def __getitem__(self, name: str) -> Tensor:
        shape, dim = self.shapes[name], self.contracted[name]
        with _open(self.path) as file:
            packed = file.get_tensor(name)
        moved = tuple(torch.empty(shape, device="meta").movedim(dim, -1).shape)
        try:
            return unpack_mask(packed, self.pattern, moved).movedim(-1, dim).contiguous()
        except MaskError as error:
            raise MaskError(f"{self.path}: {name}: {error}; the file is damaged") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class MaskFile:
    """What a mask file holds.

    `masks` is a lazy mapping name -> bool tensor of the parameter's shape (True = kept); `dict(file.masks)` reads all of it.
    `contracted` gives -1 or -2 for each name. `metadata` is what the writer added: model fingerprint, recipe and so on.
    """

    masks: Mapping[str, Tensor]
    pattern: Pattern
    contracted: dict[str, int]
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def save_masks(
    path: str | os.PathLike[str],
    masks: Mapping[str, Tensor],
    pattern: Pattern,
    contracted: Mapping[str, int],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a mask set as a mask file: atomically, and with the same bytes for the same content.

    `masks`: parameter name -> bool tensor of the parameter's shape; `contracted`: name -> the dimension (negative) along which groups
    of M run; `metadata`: strings to keep with it. Raises MaskError naming the first mask that is not N:M.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "pattern": str(pattern),
        "order": "itertools.combinations",
        "candidates": _candidate_list(pattern),
        "shapes": json.dumps({name: list(masks[name].shape) for name in sorted(masks)}),
        "contracted": json.dumps({name: _negative(contracted[name], masks[name].ndim, name) for name in sorted(masks)}),
    }
    if clash := sorted(header.keys() & (metadata or {}).keys()):
        raise MaskError(f"metadata keys {', '.join(clash)} belong to the mask file format; use other names")
    entries = []
    for name in sorted(masks):
        dim = _negative(contracted[name], masks[name].ndim, name)
        try:
            packed = pack_mask(masks[name].movedim(dim, -1), pattern)
        except MaskError as error:
            raise MaskError(f"{name}: {error}") from error
        entries.append(Entry.of(name, packed))
    write_safetensors(path, entries, {**(metadata or {}), **header})


def load_masks(path: str | os.PathLike[str]) -> MaskFile:
    """Open a mask file; the masks themselves are read when asked for.

    Raises MaskError when it is no mask file, of another version or candidate order, truncated, or its header contradicts itself.
    A digit out of range shows when its mask is read.
    """
    path = Path(path)
    with _open(path) as file:
        header: dict[str, str] = dict(file.metadata() or {})
        sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header.pop("format", None) != FORMAT:
        raise MaskError(f"{path} is a safetensors file but not a mask file (its header does not say format {FORMAT})")
    if (version := header.pop("version", None)) != VERSION:
        raise MaskError(f"{path} is a mask file of version {version}; this release reads version {VERSION}")
    try:
        pattern = Pattern.parse(header.pop("pattern"))
        shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(header.pop("shapes")).items()}
        contracted = {name: int(dim) for name, dim in json.loads(header.pop("contracted")).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise MaskError(f"{path}: the header lacks a readable pattern, shapes or contracted dimensions ({error})") from error
    header.pop("order", None)
    if header.pop("candidates", None) != _candidate_list(pattern):
        raise MaskError(f"{path}: the candidates of {pattern} are listed in an order that this release does not know")
    for name in sorted(sizes.keys() | shapes.keys() | contracted.keys()):
        if not (name in sizes and name in shapes and name in contracted):
            raise MaskError(f"{path}: {name} lacks its data, its shape or its contracted dimension")
        if not -len(shapes[name]) <= contracted[name] < 0 or shapes[name][contracted[name]] % pattern.m:
            raise MaskError(f"{path}: {name} of shape {list(shapes[name])} has no {pattern} groups along {contracted[name]}")
        if sizes[name] != (packed_size(pattern, prod(shapes[name])),):
            raise MaskError(f"{path}: {name} holds {sizes[name]} bytes, which does not fit its shape {list(shapes[name])}")
    return MaskFile(_LazyMasks(path, pattern, shapes, contracted), pattern, contracted, header, shapes)


def _candidate_list(pattern: Pattern) -> str:
    return ",".join("".join("1" if kept else "0" for kept in row) for row in pattern.candidates().tolist())


def _negative(dim: int, ndim: int, name: str) -> int:
    if not -ndim <= dim < ndim:
        raise MaskError(f"{name}: contracted dimension {dim} of a tensor with {ndim} dimensions")
    return dim if dim < 0 else dim - ndim


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise MaskError(f"{path}: there is no such mask file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MaskError(f"{path} is not a mask file, or it is truncated ({error})") from error


# The published MaskLLM files


def save_npz(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Write the published MaskLLM format (`mask_compressed.npz`), atomically.

    Key `<parameter name>.mask`, value uint8 = `np.packbits` of the row-major flattened mask, most significant bit first. It stores
    neither shape nor pattern.
    """
    arrays = {f"{name}.mask": np.packbits(masks[name].bool().cpu().contiguous().numpy().reshape(-1)) for name in sorted(masks)}
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # keywords are arrays; the stub thinks of allow_pickle


def load_npz(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[int]],
    contracted: Mapping[str, int],
    pattern: Pattern | None = None,
) -> dict[str, Tensor]:
    """Read a published MaskLLM file: name -> bool tensor, for every mask in the file.

    The file stores no shapes: `shapes` and `contracted` (from the model) must cover the names in it; more names are no harm.
    `pattern` (default 2:4, as all published files) is checked: MaskError unless every group keeps exactly N. Never unpickles.
    """
    path, pattern, masks = Path(path), pattern or Pattern(2, 4), {}
    for name, bits in npz_arrays(path):
        if name not in shapes or name not in contracted:
            raise MaskError(f"{path}: holds a mask for {name}, which the model does not have or which cannot be masked")
        shape, dim = tuple(shapes[name]), _negative(contracted[name], len(shapes[name]), name)
        weights = prod(shape)
        if bits.dtype != np.uint8 or bits.shape != (-(-weights // 8),):
            raise MaskError(
                f"{path}: {name} holds {bits.size} bytes of {bits.dtype}, but shape {list(shape)} takes {-(-weights // 8)}"
            )
        flat = np.unpackbits(bits)
        if flat[weights:].any():
            raise MaskError(f"{path}: {name} has bits beyond its shape {list(shape)}")
        mask = torch.from_numpy(flat[:weights]).bool().reshape(shape)
        _check_exact(mask, pattern, dim, f"{path}: {name}")
        masks[name] = mask
    return masks


def npz_arrays(path: str | os.PathLike[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Parameter names and packed bits (uint8) of a published MaskLLM file, one at a time. Raises MaskError when it is none."""
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise MaskError(f"{path} is not an .npz file")
            for key in file.files:
                if not key.endswith(".mask"):
                    raise MaskError(f"{path}: key {key!r} does not end in '.mask'; this is not a MaskLLM mask file")
                yield key.removesuffix(".mask"), file[key]
    except FileNotFoundError as error:
        raise MaskError(f"{path}: there is no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(f"{path} is not an .npz file of plain arrays, or it is damaged ({error})") from error


def _check_exact(mask: Tensor, pattern: Pattern, dim: int, name: str) -> None:
    pattern.check_divides(mask.shape[dim], name)
    kept = group_counts(mask, pattern.m, dim)
    if bad := int((kept != pattern.n).sum()):
        raise MaskError(f"{name}: {bad} of {kept.numel()} groups do not keep exactly {pattern.n} of {pattern.m} weights")


# Counting, identity and comparison


def group_counts(mask: Tensor, m: int, dim: int = -1) -> Tensor:
    """True entries of each group of `m` along `dim`, which then is last: bool `[..., K, ...]` -> uint8 `[..., K/m]`."""
    columns = mask.movedim(dim, -1).unflatten(-1, (-1, m)).view(torch.uint8).unbind(-1)
    counts = columns[0].clone()
    for column in columns[1:]:  # m passes over bytes: many times faster than a sum over a short last dimension
        counts += column
    return counts


def mask_digest(masks: Mapping[str, Tensor]) -> str:
    """Identity of a result: sha256 over names, shapes and bits in the order of the names. The same for any file format."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name].bool().cpu().contiguous()
        digest.update(json.dumps([name, list(mask.shape)]).encode())
        flat = mask.reshape(-1).numpy()
        for start in range(0, flat.size, _CHUNK):
            digest.update(np.packbits(flat[start : start + _CHUNK]).tobytes())
    return digest.hexdigest()


def difference(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], pattern: Pattern, contracted: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Groups that differ between two mask sets: name -> (groups differing, groups). Raises MaskError when names or shapes differ."""
    if a.keys() != b.keys():
        raise MaskError(f"the mask sets differ in their names, first in {min(a.keys() ^ b.keys())}")
    result = {}
    for name in a:
        first, second = a[name], b[name]
        if first.shape != second.shape:
            raise MaskError(f"{name}: shapes {list(first.shape)} and {list(second.shape)} differ")
        dim = _negative(contracted[name], first.ndim, name)
        pattern.check_divides(first.shape[dim], name)
        groups = (first.bool() != second.bool().to(first.device)).movedim(dim, -1).unflatten(-1, (-1, pattern.m)).any(-1)
        result[name] = (int(groups.sum()), groups.numel())
    return result
