"""Machine code of a compiled kernel, read back: its instructions, what they do, and its loops.

SASS of NVIDIA's targets as nvdisasm prints it, and the assembly that LLVM writes for AMD's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import add

SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
AMD_LINE = re.compile(r"\s+([a-z]\w+)\s*([^;]*)")
SECTION = re.compile(r"\s*\.section\s+([^,\s]+)")
FUNCTION = ".text."
LABEL = re.compile(r"(\.L(?:_x_|BB)\w+):")
TARGET = re.compile(r"(\.L_x_\w+)")
SASS_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short": 2, "sshort": 2, "ubyte": 1,
              "sbyte": 1}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str = ""

    @property
    def stem(self) -> str:
        """LDG of LDG.E.128; on AMD the whole opcode."""
        return self.opcode.split(".")[0]

    @property
    def is_matrix_product(self) -> bool:
        """One of the tensor cores' (HMMA, HGMMA, UTCHMMA; v_mfma, v_smfmac)."""
        return (self.stem.endswith("MMA") and self.stem != "FFMA") or self.stem.startswith(("v_mfma", "v_smfmac"))

    @property
    def is_multiply_add(self) -> bool:
        """One of the ordinary units', in float32."""
        return self.stem in ("FFMA", "FFMA2") or self.stem.startswith(("v_fma_f32", "v_fmac_f32", "v_pk_fma_f32"))

    @property
    def is_async_copy(self) -> bool:
        """From global to shared memory, past the registers: LDGSTS; UTMALDG, UBLKCP in bulk; on AMD a load to LDS."""
        if self.stem.startswith(("global_load", "buffer_load")):
            return "_lds_" in self.stem or re.search(r"\blds\b", self.operands) is not None
        return self.stem in ("LDGSTS", "UTMALDG", "UBLKCP")

    @property
    def is_global_load(self) -> bool:
        """By each thread, to registers or to shared memory."""
        return self.stem in ("LDG", "LDGSTS") or self.stem.startswith(("global_load", "buffer_load", "flat_load"))

    @property
    def is_spill(self) -> bool:
        """To or from memory that stands in for registers."""
        return self.stem in ("LDL", "STL") or self.stem.startswith("scratch_")

    @property
    def is_popcount(self) -> bool:
        return self.stem in ("POPC", "UPOPC") or self.stem.startswith(("v_bcnt", "s_bcnt"))

    @property
    def width(self) -> int:
        """Bytes that one thread loads or stores with it."""
        if self.stem.isupper():
            return next((SASS_WIDTHS[part] for part in self.opcode.split(".") if part in SASS_WIDTHS), 4)
        return next((AMD_WIDTHS[part] for part in self.stem.split("_") if part in AMD_WIDTHS), 4)


@dataclass
class Block:
    """Instructions that run one after the other; ``successors`` are the blocks that can follow."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


# A label, or an instruction, the labels it can jump to and whether the next line can follow.
Line = str | tuple[Instruction, tuple[str, ...], bool]


def sass_blocks(text: str) -> list[Block]:
    """The basic blocks of the one kernel in what ``nvdisasm -c`` prints. Functions that it calls are no part of its
    loops."""
    (kernel,) = sass_kernels(text).values()
    return kernel


def sass_kernels(text: str) -> dict[str, list[Block]]:
    """The same of every kernel, by its (mangled) name."""
    kernels: dict[str, list[Line]] = {}
    lines: list[Line] | None = None
    for line in text.splitlines():
        if section := SECTION.match(line):
            is_code = section[1].startswith(FUNCTION)
            lines = kernels.setdefault(section[1].removeprefix(FUNCTION), []) if is_code else None
        elif lines is not None and (label := LABEL.match(line)):
            lines.append(label[1])
        elif lines is not None and (match := SASS_LINE.match(line)):
            guard, opcode, operands = match.groups()
            instruction = Instruction(opcode, operands)
            jumps, falls = (), True
            if instruction.stem in ("BRA", "JMP", "CALL"):  # ptxas also leaves loops by CALL
                jumps = tuple(TARGET.findall(operands))
                # BRA.U UP0, `(.L_x_0): the condition can stand among the operands
                falls = guard is not None or "," in operands or (instruction.stem == "CALL" and not jumps)
            elif instruction.stem in ("EXIT", "RET"):
                falls = guard is not None
            elif instruction.stem in ("BRX", "JMX"):  # a table of a switch, if nvdisasm can tell
                jumps, falls = tuple(TARGET.findall(operands)), guard is not None
                if not jumps:
                    raise ValueError(f"assembly: an indirect branch, {opcode} {operands}: its loops cannot be found")
            lines.append((instruction, jumps, falls))
    return {name: _blocks(lines) for name, lines in kernels.items()}


def amd_blocks(text: str) -> list[Block]:
    """The basic blocks of the one kernel in LLVM's assembly."""
    lines: list[Line] = []
    for line in text.splitlines():
        if line.strip().startswith(".Lfunc_end"):
            break
        if label := LABEL.match(line):
            lines.append(label[1])
        elif match := AMD_LINE.match(line):
            instruction = Instruction(match[1], match[2].strip())
            branches = instruction.stem.startswith(("s_branch", "s_cbranch"))
            falls = instruction.stem not in ("s_branch", "s_endpgm", "s_setpc_b64")
            lines.append((instruction, (instruction.operands,) if branches else (), falls))
    return _blocks(lines)


def _blocks(lines: Iterable[Line]) -> list[Block]:
    blocks, starts, found = [Block()], {}, []
    for line in lines:
        if isinstance(line, str):
            if blocks[-1].instructions:
                blocks[-1].successors.append(len(blocks))
                blocks.append(Block())
            starts[line] = len(blocks) - 1
            continue
        instruction, jumps, falls = line
        blocks[-1].instructions.append(instruction)
        found += [(len(blocks) - 1, jump) for jump in jumps]
        if jumps or not falls:
            if falls:
                blocks[-1].successors.append(len(blocks))
            blocks.append(Block())
    for block, label in found:
        if label in starts:
            blocks[block].successors.append(starts[label])
    for block in blocks:
        block.successors = [s for s in block.successors if s < len(blocks)]
    return blocks


def loops(blocks: list[Block]) -> list[frozenset[int]]:
    """The natural loops, as sets of blocks; those with one header are one loop."""
    return list(loops_by_header(blocks).values())


def loops_by_header(blocks: list[Block]) -> dict[int, frozenset[int]]:
    """The same, by the block that every pass begins with.

    By dominators, not by the order of addresses: ptxas moves rarely run parts of a loop to the end of the kernel.
    """
    reachable, stack = {0}, [0]
    while stack:
        for s in blocks[stack.pop()].successors:
            if s not in reachable:
                reachable.add(s)
                stack.append(s)
    before: dict[int, list[int]] = {b: [] for b in reachable}
    for b in reachable:
        for s in blocks[b].successors:
            before[s].append(b)
    dominators = {b: set(reachable) for b in reachable}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reachable - {0}):
            new = {b} | set.intersection(*(dominators[p] for p in before[b]))
            changed |= new != dominators[b]
            dominators[b] = new
    bodies: dict[int, set[int]] = {}
    for b in sorted(reachable):
        for header in blocks[b].successors:
            if header not in dominators[b]:
                continue
            body = bodies.setdefault(header, {header})
            stack = [b]
            while stack:
                inner = stack.pop()
                if inner not in body:
                    body.add(inner)
                    stack.extend(before[inner])
    return {header: frozenset(bodies[header]) for header in sorted(bodies)}


def product_loops(blocks: list[Block]) -> list[list[Instruction]]:
    """Instructions of every innermost loop that multiplies matrices: by the tensor cores, where the kernel uses them,
    else by multiply-adds."""
    everything = [i for block in blocks for i in block.instructions]
    by_tensor_cores = any(i.is_matrix_product for i in everything)

    def multiplies(body: frozenset[int]) -> bool:
        inside = [i for b in body for i in blocks[b].instructions]
        return any(i.is_matrix_product if by_tensor_cores else i.is_multiply_add for i in inside)

    found = [body for body in loops(blocks) if multiplies(body)]
    innermost = [body for body in found if not any(other < body for other in found)]
    return [[i for b in sorted(body) for i in blocks[b].instructions] for body in innermost]


def shortest_pass(
    blocks: list[Block], header: int, body: frozenset[int], wanted: Mapping[str, int]
) -> list[Instruction] | None:
    """The fewest instructions once round a loop, with at least so many of some opcodes; None if there is no such way.

    What a pass is most of the time: other ways are for what is rare, such as the step to the next task.

    wanted: patterns that match whole opcodes, and how often
    """
    patterns, most = [re.compile(pattern) for pattern in wanted], tuple(wanted.values())
    counts = {
        b: [sum(p.fullmatch(i.opcode) is not None for i in blocks[b].instructions) for p in patterns] for b in body
    }
    # Dijkstra's search; what has been counted on the way is part of a place.
    start = (header, tuple(map(min, counts[header], most)))
    lengths, before = {start: len(blocks[header].instructions)}, {start: start}
    waiting = [(lengths[start], start)]
    while waiting:
        length, place = heappop(waiting)
        if length > lengths[place]:
            continue
        b, found = place
        if found == most and header in blocks[b].successors:
            way = [place]
            while way[-1] != start:
                way.append(before[way[-1]])
            return [i for b, _ in reversed(way) for i in blocks[b].instructions]
        for s in body.intersection(blocks[b].successors) - {header}:
            there = (s, tuple(map(min, map(add, found, counts[s]), most)))
            further = length + len(blocks[s].instructions)
            if further < lengths.get(there, further + 1):
                lengths[there], before[there] = further, place
                heappush(waiting, (further, there))
    return None
