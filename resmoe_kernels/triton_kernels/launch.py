"""How a Triton kernel is started: on a GPU, under Triton's interpreter, or only written down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton

from resmoe_kernels.heuristics import Tile, arch_of, meet

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: fixed when kernels are decorated


@dataclass(frozen=True)
class Launch:
    """One start of a kernel. arguments: tensors, numbers and None in the kernel's order; constants: its constexprs."""

    kernel: triton.KernelInterface
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict
    tile: Tile
    overlaps: bool

    @property
    def name(self) -> str:
        return self.kernel.__name__


_recording: tuple[str, list[Launch]] | None = None


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Writes launches for a target down instead of making them; what they would compute stays uninitialised.

    With fake or meta tensors this needs no GPU and no memory: reports and accounts are made from it.
    """
    global _recording
    launches: list[Launch] = []
    before, _recording = _recording, (target, launches)
    try:
        yield launches
    finally:
        _recording = before


def launch(
    kernel: triton.KernelInterface,
    grid: tuple[int, ...],
    *arguments: object,
    tile: Tile,
    overlaps: bool = False,
    **constants: object,
) -> None:
    """Starts ``grid`` programs of a kernel.

    overlaps: the kernel calls gdc_wait (constexpr OVERLAPS) and may be started before the kernel ahead of it on the
        stream has ended: programmatic dependent launch, where the target has it
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, arguments, constants, tile, overlaps))
        return
    options = {"launch_pdl": True} if overlaps else {}
    kernel[grid](*arguments, **constants, **options, num_warps=tile.warps, num_stages=tile.stages)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv can be called by kernels, too, and costs the host 2 microseconds a time."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; triton.next_power_of_2 costs as much as its cdiv."""
    return 1 << (n - 1).bit_length()


def target_of(device: torch.device) -> str:
    """``sm_90 NVIDIA H200``, whose numbers heuristics then know; ``interpreter`` where kernels run on the CPU."""
    if _recording is not None:
        return _recording[0]
    return "interpreter" if INTERPRETED else _target(device)


def has_dependent_launch(target: str) -> bool:
    """Programmatic dependent launch came with Hopper."""
    return target.startswith("sm_") and int(arch_of(target).removeprefix("sm_")) >= 90


@cache
def _target(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    target = f"sm_{properties.major}{properties.minor} {properties.name}"
    # Two transfers a clock of the memory (kHz), over its bus (bits). CUDA 13 no longer tells the clock of every device.
    clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    meet(target, properties.multi_processor_count, shared, round(2 * clock * width / 8 / 1e6))
    return target
