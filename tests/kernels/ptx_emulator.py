"""Execute compiled PTX on the CPU: all threads of one block in lockstep, numpy arrays for registers, `mma.sp` as the PTX ISA documents it.

It is there to run a kernel that no machine at hand can run, so it refuses whatever it does not know: an unknown instruction, a branch
that not all threads take alike, an access outside the tensors that were passed, or metadata that is not legal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

LEGAL_CODES = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)
_GAP = 4096  # unmapped bytes between tensors
_SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
_KINDS = {"pred", "bf16", "f16", "f32", "f32x2", *(letter + str(width) for letter in "bsu" for width in (16, 32, 64))}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns of `bf16` or `f16` -> float32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def from_float(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> 16-bit patterns, rounded to nearest even."""
    if kind == "bf16":
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return x.astype(np.float16).view(np.uint16)


def mma_sp_m16n8k32(a: np.ndarray, b: np.ndarray, c: np.ndarray, e: np.ndarray, selector: int, kind: str) -> np.ndarray:
    """One `mma.sp.sync.aligned.m16n8k32.row.col.f32.KIND.KIND.f32` of a warp.

    a and b uint32 `[32 lanes, 4]`, c float32 `[32, 4]`, e uint32 `[32]` -> d float32 `[32, 4]`. Fragments by "Matrix fragments for
    sparse mma.m16n8k32 with .f16/.bf16 types"; in the letters used there groupID is lane >> 2 and threadID_in_group lane % 4.
    """
    dense_a, dense_b = np.zeros((16, 32)), np.zeros((32, 8))
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):  # a_0 .. a_7: pairs share a register, and are the two kept values of four columns
            row = group if i in (0, 1, 4, 5) else group + 8
            first_column = 4 * thread + (16 if i >= 4 else 0)
            source = group * 4 + 2 * selector + first_column // 16  # the lane whose word holds the codes of these 16 columns
            half = int(e[source]) >> (0 if row < 8 else 16) & 0xFFFF
            code = half >> first_column % 16 & 15  # four bits for each four columns
            assert code in LEGAL_CODES, f"metadata {code:#06b} of row {row}, columns {first_column} and on is not legal"
            position = code & 3 if i % 2 == 0 else code >> 2
            dense_a[row, first_column + position] = to_float(np.array(int(a[lane, i // 2]) >> 16 * (i % 2) & 0xFFFF), kind)
        for i in range(8):  # b_0 .. b_7
            row = 8 * (i // 2) + 2 * thread + i % 2
            dense_b[row, group] = to_float(np.array(int(b[lane, i // 2]) >> 16 * (i % 2) & 0xFFFF), kind)
    product = dense_a @ dense_b
    lane = np.arange(32)[:, None]
    i = np.arange(4)[None, :]
    return (c + product[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]).astype(np.float32)


@dataclass
class Memory:
    """Global memory: arrays at addresses with unmapped gaps between them."""

    tensors: dict[int, np.ndarray] = field(default_factory=dict)  # address -> its bytes
    top: int = 1 << 32

    def place(self, array: np.ndarray) -> int:
        """The address of a contiguous array, which is shared, not copied."""
        address, raw = self.top, array.reshape(-1).view(np.uint8)
        self.tensors[address] = raw
        self.top += -(-len(raw) // 256) * 256 + _GAP
        return address

    def locate(self, address: int, size: int) -> tuple[np.ndarray, int]:
        for start, raw in self.tensors.items():
            if start <= address and address + size <= start + len(raw):
                assert address % size == 0, f"{size} bytes at {address:#x} are not aligned"
                return raw, address - start
        raise AssertionError(f"access to {size} bytes at {address:#x}, outside of every tensor")


class Block:
    """One block of threads executing a kernel."""

    def __init__(self, ptx: str, threads: int, block: tuple[int, int], parameters: list[int], memory: Memory) -> None:
        self.threads, self.memory = threads, memory
        self.shared = Memory({0: np.zeros(1 << 17, np.uint8)})
        thread = np.arange(threads, dtype=np.uint64)
        special = {"%tid.x": thread, "%ctaid.x": thread * 0 + np.uint64(block[0]), "%ctaid.y": thread * 0 + np.uint64(block[1])}
        self.registers: dict[str, np.ndarray] = {**special, "global_smem": thread * 0}
        self.parameters = parameters
        self.statements, self.labels = parse(ptx)

    def run(self, limit: int = 1_000_000) -> None:
        at = 0
        for _ in range(limit):
            guard, opcode, operands = self.statements[at]
            active = np.ones(self.threads, bool)
            if guard:
                active = self.registers[guard.lstrip("!")] ^ guard.startswith("!")
            at += 1
            if opcode[0] == "ret":
                return
            if opcode[0] == "bra":
                assert active.all() or not active.any(), f"threads diverge at {guard} {operands}"
                at = self.labels[operands[0]] if active.all() else at
            else:
                self.step(opcode, operands, active)
        raise AssertionError(f"no end after {limit} instructions")

    def bits(self, operand: str) -> np.ndarray:
        """The value of a register or constant as unsigned integers, or of a predicate as bool."""
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), np.uint64)
        return np.full(self.threads, int(operand, 0) & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def read(self, operand: str, kind: str) -> np.ndarray:
        """The value as numbers of a PTX type."""
        bits = self.bits(operand)
        if kind == "pred":
            return bits
        if kind in ("bf16", "f16"):
            return to_float(bits.astype(np.uint16), kind)
        if kind == "f32x2":
            return bits.view(np.float32).reshape(-1, 2)
        width = int(kind[1:])
        unsigned = bits.astype(_UNSIGNED[width])
        if kind[0] == "f":
            return unsigned.view(np.float32)
        return unsigned.view(_SIGNED[width]) if kind[0] == "s" else unsigned

    def write(self, operand: str, value: np.ndarray, active: np.ndarray) -> None:
        if value.ndim == 2:  # f32x2
            value = np.ascontiguousarray(value).view(np.uint64)[:, 0]
        if value.dtype != bool:
            value = value.view(_UNSIGNED[8 * value.dtype.itemsize]).astype(np.uint64)
        before = self.registers.get(operand)
        self.registers[operand] = value.copy() if before is None or active.all() else np.where(active, value, before)

    def step(self, opcode: list[str], operands: list[str], active: np.ndarray) -> None:
        name, kind = opcode[0], opcode[-1]
        match name:
            case "ld" if opcode[1] == "param":
                index = int(re.search(r"_param_(\d+)", operands[1])[1])
                self.write(operands[0], np.full(self.threads, self.parameters[index] & 0xFFFFFFFFFFFFFFFF, np.uint64), active)
            case "ld" | "st":
                self.move_memory(name, opcode, operands, active)
            case "mov" if operands[0].startswith("{") or operands[1].startswith("{"):
                self.move_pair(int(kind[1:]) // 2, operands, active)
            case "bar":
                pass  # lockstep
            case "shfl":
                assert opcode[1:3] == ["sync", "bfly"]
                source = np.arange(self.threads) ^ int(operands[2], 0)
                self.write(operands[0], self.bits(operands[1])[source].astype(np.uint32), active)
            case "mma":
                self.mma(opcode, operands)
            case _:
                self.write(operands[0], self.compute(name, opcode, kind, operands[1:]), active)

    def compute(self, name: str, opcode: list[str], kind: str, operands: list[str]) -> np.ndarray:
        known = {"lo", "wide", "rn", "lt", "le", "gt", "ge", "eq", "ne", "f32"}
        if kind not in _KINDS or not set(opcode[1:-2]) <= known or (len(opcode) > 2 and opcode[-2] not in known | _KINDS):
            raise NotImplementedError(".".join(opcode))
        if name == "setp":
            x, y = (self.read(operand, kind) for operand in operands)
            return {"lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "eq": x == y, "ne": x != y}[opcode[1]]
        if name == "selp":
            return np.where(self.bits(operands[2]), self.read(operands[0], kind), self.read(operands[1], kind))
        if name == "cvt":
            source, target = opcode[-1], opcode[-2]
            x = self.read(operands[0], source)
            if target in ("bf16", "f16"):
                return from_float(x, target)
            return x if target == "f32" else x.astype((_SIGNED if target[0] == "s" else _UNSIGNED)[int(target[1:])])
        if name == "bfe":
            x, first, length = (self.read(operand, "u32") for operand in operands)
            assert (length > 0).all()
            assert (first + length <= 32).all()
            up = np.uint32(32) - length  # shifted to the top and down again: with the sign, for s32
            top = (x << (up - first)).view(np.int32 if kind == "s32" else np.uint32)
            return top >> up.astype(top.dtype)
        if name in ("shl", "shr"):
            x, by = self.read(operands[0], kind), self.read(operands[1], "u32")
            assert (by < 8 * x.dtype.itemsize).all()
            return x << by.astype(x.dtype) if name == "shl" else x >> by.astype(x.dtype)
        wide = len(opcode) > 2 and opcode[1] == "wide"
        if opcode[1:3] == ["rn", "f32"] and kind in ("bf16", "f16"):  # add.rn.f32.bf16: a narrow first operand
            x = [self.read(operands[0], kind), *(self.read(operand, "f32") for operand in operands[1:])]
        else:
            x = [self.read(operand, kind) for operand in operands[: 2 if wide else 3]]
        if wide:
            x = [value.astype(np.int64 if kind[0] == "s" else np.uint64) for value in x]
            x += [self.read(operand, kind[0] + "64") for operand in operands[2:]]
        with np.errstate(over="ignore"):
            match name:
                case "mov":
                    return x[0]
                case "add":
                    return x[0] + x[1]
                case "sub":
                    return x[0] - x[1]
                case "mul":
                    return x[0] * x[1]
                case "mad":
                    return x[0] * x[1] + x[2]
                case "and":
                    return x[0] & x[1]
                case "or":
                    return x[0] | x[1]
                case "xor":
                    return x[0] ^ x[1]
                case "not":
                    return ~x[0]
        raise NotImplementedError(".".join(opcode))

    def move_memory(self, name: str, opcode: list[str], operands: list[str], active: np.ndarray) -> None:
        memory = self.memory if opcode[1] == "global" else self.shared
        size = int(opcode[-1][1:]) // 8
        where, data = (operands[1], operands[0]) if name == "ld" else (operands[0], operands[1])
        register, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+))?\s*\]", where).groups()
        address = self.bits(register).astype(np.int64) + int(offset or 0)
        registers = split(data.strip("{}"))
        values = [np.zeros(self.threads, _UNSIGNED[8 * size]) for _ in registers]
        for thread in np.flatnonzero(active):
            raw, start = memory.locate(int(address[thread]), size * len(registers))
            for i, target in enumerate(registers):
                part = slice(start + i * size, start + (i + 1) * size)
                if name == "ld":
                    values[i][thread] = raw[part].view(_UNSIGNED[8 * size])[0]
                else:
                    raw[part] = self.bits(target)[thread : thread + 1].astype(_UNSIGNED[8 * size]).view(np.uint8)
        if name == "ld":
            for target, value in zip(registers, values, strict=True):
                self.write(target, value, active)

    def move_pair(self, width: int, operands: list[str], active: np.ndarray) -> None:
        """`mov {a, b}, r` and `mov r, {a, b}`, a and b of `width` bits."""
        if operands[0].startswith("{"):
            value = self.bits(operands[1])
            for i, target in enumerate(split(operands[0].strip("{}"))):
                self.write(target, (value >> np.uint64(width * i)).astype(_UNSIGNED[width]), active)
        else:
            low, high = (self.bits(part).astype(_UNSIGNED[2 * width]) for part in split(operands[1].strip("{}")))
            self.write(operands[0], low | high << _UNSIGNED[2 * width](width), active)

    def mma(self, opcode: list[str], operands: list[str]) -> None:
        assert opcode[:6] == ["mma", "sp::ordered_metadata", "sync", "aligned", "m16n8k32", "row"]
        assert opcode[6:] == ["col", "f32", opcode[8], opcode[8], "f32"]
        groups = [split(operand.strip("{}")) for operand in operands[:4]]
        d, a, b, c = groups[0], *(np.stack([self.bits(register) for register in group], 1) for group in groups[1:])
        e = self.bits(operands[4])
        c = c.astype(np.uint32).view(np.float32)
        out = np.empty((self.threads, 4), np.float32)
        for warp in range(0, self.threads, 32):
            lanes = slice(warp, warp + 32)
            out[lanes] = mma_sp_m16n8k32(a[lanes], b[lanes], c[lanes], e[lanes], int(operands[5], 0), opcode[8])
        for i, target in enumerate(d):
            self.write(target, np.ascontiguousarray(out[:, i]), np.ones(self.threads, bool))


def split(text: str) -> list[str]:
    """Operands at commas, those inside of braces and brackets kept together."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def parse(ptx: str) -> tuple[list[tuple[str, list[str], list[str]]], dict[str, int]]:
    """The statements (guard, opcode, operands) of the one kernel of a PTX text, and where its labels are."""
    body = re.search(r"\.entry.*?^\{(.*?)^\}", ptx, re.S | re.M)[1]
    lines = [re.sub(r"//.*", "", line).strip() for line in body.splitlines()]
    text = "\n".join(line for line in lines if line and not line.startswith("."))
    statements: list[tuple[str, list[str], list[str]]] = []
    labels: dict[str, int] = {}
    for part in re.split(r";|(?<=:)\n", text):
        statement = " ".join(part.split())
        while found := re.match(r"(\$\w+):\s*", statement):
            labels[found[1]] = len(statements)
            statement = statement[found.end() :]
        if not statement:
            continue
        guard = ""
        if statement.startswith("@"):
            guard, statement = statement[1:].split(" ", 1)
        opcode, _, rest = statement.strip().partition(" ")
        statements.append((guard, re.split(r"(?<!:)\.", opcode), split(rest)))
    return statements, labels


def launch(ptx: str, threads: int, grid: tuple[int, int], arguments: list[np.ndarray | int]) -> None:
    """Run every block of a grid, one after the other; arrays are read and written in place."""
    memory = Memory()
    parameters = [memory.place(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    for y in range(grid[1]):
        for x in range(grid[0]):
            Block(ptx, threads, (x, y), parameters, memory).run()
