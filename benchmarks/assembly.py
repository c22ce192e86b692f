"""Machine code of a compiled kernel, read back: its instructions, what they do, and its loops.

SASS of NVIDIA's targets as nvdisasm prints it, and the assembly that LLVM writes for AMD's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
AMD_LINE = re.compile(r"\s+([a-z]\w+)\s*([^;]*)")
SECTION = re.compile(r"\s*\.section\s+([^,\s]+)")
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


def sass_blocks(text: str) -> list[Block]:
    """The basic blocks of the one kernel in what ``nvdisasm -c`` prints. Functions that it calls are no part of its
    loops."""
    lines: list[tuple[str, Instruction, str | None, bool] | str] = []
    inside = False
    for line in text.splitlines():
        if section := SECTION.match(line):
            inside = section[1].startswith(".text.")
        elif inside and (label := LABEL.match(line)):
            lines.append(label[1])
        elif inside and (match := SASS_LINE.match(line)):
            guard, opcode, operands = match.groups()
            instruction = Instruction(opcode, operands)
            jump, falls = None, True
            if instruction.stem in ("BRA", "JMP", "CALL"):  # ptxas also leaves loops by CALL
                jump = target[1] if (target := TARGET.search(operands)) else None
                # BRA.U UP0, `(.L_x_0): the condition can stand among the operands
                falls = guard is not None or "," in operands or (instruction.stem == "CALL" and jump is None)
            elif instruction.stem in ("EXIT", "RET"):
                falls = guard is not None
            elif instruction.stem in ("BRX", "JMX"):
                raise ValueError(f"assembly: an indirect branch, {opcode} {operands}: its loops cannot be found")
            lines.append(("", instruction, jump, falls))
    return _blocks(lines)


def amd_blocks(text: str) -> list[Block]:
    """The basic blocks of the one kernel in LLVM's assembly."""
    lines: list[tuple[str, Instruction, str | None, bool] | str] = []
    for line in text.splitlines():
        if line.strip().startswith(".Lfunc_end"):
            break
        if label := LABEL.match(line):
            lines.append(label[1])
        elif match := AMD_LINE.match(line):
            instruction = Instruction(match[1], match[2].strip())
            branches = instruction.stem.startswith(("s_branch", "s_cbranch"))
            falls = instruction.stem not in ("s_branch", "s_endpgm", "s_setpc_b64")
            lines.append(("", instruction, instruction.operands if branches else None, falls))
    return _blocks(lines)


def _blocks(lines: Iterable[tuple[str, Instruction, str | None, bool] | str]) -> list[Block]:
    """lines: labels, and instructions as ("", instruction, label it can jump to, whether the next one can follow)."""
    blocks, starts, jumps = [Block()], {}, []
    for line in lines:
        if isinstance(line, str):
            if blocks[-1].instructions:
                blocks[-1].successors.append(len(blocks))
                blocks.append(Block())
            starts[line] = len(blocks) - 1
            continue
        _, instruction, jump, falls = line
        blocks[-1].instructions.append(instruction)
        if jump is not None:
            jumps.append((len(blocks) - 1, jump))
        if jump is not None or not falls:
            if falls:
                blocks[-1].successors.append(len(blocks))
            blocks.append(Block())
    for block, label in jumps:
        if label in starts:
            blocks[block].successors.append(starts[label])
    for block in blocks:
        block.successors = [s for s in block.successors if s < len(blocks)]
    return blocks


def loops(blocks: list[Block]) -> list[frozenset[int]]:
    """The natural loops, as sets of blocks; those with one header are one loop.

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
    return [frozenset(bodies[header]) for header in sorted(bodies)]


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
