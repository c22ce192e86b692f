"""How many blocks of a kernel one multiprocessor holds at a time, from the resources that each takes.

NVIDIA's multiprocessors and AMD's compute units are alike here: four schedulers, each with 512 registers for every
lane of a warp, handed out in steps of eight; a pool of shared memory; a limit of threads and one of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULERS = 4
REGISTERS = 512  # of one scheduler, per lane
REGISTER_STEP = 8
TENSOR_COLUMNS = 512  # of tensor memory, where there is one


@dataclass(frozen=True)
class Unit:
    """shared: bytes;  reserved: bytes of it that every block takes beside its own, which it cannot use
    step: bytes that shared memory is handed out in;  warps: at a time;  lanes: of a warp"""

    shared: int
    reserved: int
    step: int
    warps: int
    blocks: int
    lanes: int = 32


UNITS = {
    "sm_80": Unit(164 << 10, 1 << 10, 128, 64, 32),
    "sm_89": Unit(100 << 10, 1 << 10, 128, 48, 24),
    "sm_90": Unit(228 << 10, 1 << 10, 128, 64, 32),
    "sm_100": Unit(228 << 10, 1 << 10, 128, 64, 32),
    "gfx942": Unit(64 << 10, 0, 512, 32, 16, lanes=64),
}


@dataclass(frozen=True)
class Occupancy:
    """limits: blocks that each resource has room for;  percent: of the warps that the multiprocessor could hold"""

    limits: dict[str, int]
    percent: int

    @property
    def blocks(self) -> int:
        return min(self.limits.values())

    @property
    def limited_by(self) -> list[str]:
        return [name for name, blocks in self.limits.items() if blocks == self.blocks]


def occupancy(target: str, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> Occupancy:
    """Of blocks of ``warps`` warps that take ``registers`` registers per thread, ``shared`` bytes of shared memory,
    static and dynamic, and ``tensor_columns`` columns of tensor memory."""
    unit = UNITS[target]
    register_warps = SCHEDULERS * (REGISTERS // _round_up(max(registers, 1), REGISTER_STEP))
    limits = {
        "registers": register_warps // warps,
        "shared memory": unit.shared // max(1, _round_up(shared + unit.reserved, unit.step)),
        "threads": unit.warps // warps,
        "blocks": unit.blocks,
    }
    if tensor_columns:
        limits["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    return Occupancy(limits, round(100 * min(limits.values()) * warps / unit.warps))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
