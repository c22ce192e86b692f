"""What every access of an interpreted kernel to memory is held to: its tensor's bounds, and an order on a real device.

On a device the programs of one launch run in any order and at once, and so do the threads of one program. Here they
run one by one, so a race gives the right numbers; it is found by what it is: two accesses to one element, one of them
a store, without anything between them that orders them. Between programs that is a release (an atomic with release
semantics) acquired by the other; within a program a barrier; between launches that overlap, gdc_wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter

# Pointers carry the number of their tensor above the 48 bits of an address: pointer arithmetic keeps it, so an access
# that lands in another tensor is seen too.
ADDRESS_BITS = 48
SEM = interpreter._ir.MEM_SEMANTIC
RELEASES, ACQUIRES = (SEM.RELEASE, SEM.ACQUIRE_RELEASE), (SEM.ACQUIRE, SEM.ACQUIRE_RELEASE)


class BadAccess(AssertionError):
    pass


@dataclass
class Shadow:
    """Who last stored to, and who first read, each element of a storage: stamps, see ``Memory._stamp``; 0 is nobody."""

    stored: np.ndarray | None = None
    read: np.ndarray | None = None


@dataclass
class Region:
    name: str
    start: int  # address
    size: int  # elements
    itemsize: int
    shift: int  # of element 0 in its storage
    storage: int
    shadow: Shadow
    length: int  # elements of the storage

    def __str__(self) -> str:
        return f"{self.name} ({self.size} elements)"


@dataclass
class Memory:
    """One launch. overlaps: it may start while launches ahead of it, which store to ``unfinished``, still run."""

    kernel: str
    overlaps: bool = False
    unfinished: set[int] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    shadows: dict[int, Shadow] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)  # storages this launch has stored to
    released: dict[int, dict[int, int]] = field(default_factory=dict)  # per atomic's address: program -> clock
    seen: dict[int, int] = field(default_factory=dict)  # of this program: others' stores it is ordered after
    program: int = -1
    clock: int = 0  # releases of this program
    barriers: int = 0
    stores_since_barrier: bool = False
    waited: bool = True

    # ---- what a kernel is given

    def pointer(self, tensor: torch.Tensor) -> np.ndarray:
        start, storage = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        itemsize = tensor.element_size()
        self.regions.append(
            Region(
                self.names.get(start, "a tensor"),
                start,
                extent if tensor.numel() else 0,
                itemsize,
                (start - storage) // itemsize,
                storage,
                self.shadows.setdefault(storage, Shadow()),
                tensor.untyped_storage().nbytes() // itemsize,
            )
        )
        return np.array([start + (len(self.regions) << ADDRESS_BITS)], np.uint64)

    def start(self, program: int) -> None:
        self.end_program()
        self.program, self.clock, self.barriers, self.stores_since_barrier = program, 0, 0, False
        self.seen, self.waited = {}, not self.overlaps

    def end_program(self) -> None:
        if not self.waited:
            raise BadAccess(f"{self.kernel}: program {self.program} ends without gdc_wait")

    # ---- what a program does

    def barrier(self) -> None:
        self.barriers += 1
        self.stores_since_barrier = False

    def wait(self) -> None:
        self.waited = True

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """-> the real addresses."""
        region, element, addresses = self._elements("load", pointers, mask)
        if region is not None:
            if not self.waited and region.storage in self.unfinished:
                raise BadAccess(f"{self.kernel}: {region} is read before gdc_wait, while a launch ahead may write it")
            self._check_order("reads", region, element, region.shadow.stored, "stored", own=True)
            self._mark_read(region, element)
        return addresses

    def store(self, pointers: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
        region, element, addresses = self._elements("store", pointers, mask)
        if region is not None:
            if not self.waited:
                raise BadAccess(f"{self.kernel}: {region} is written before gdc_wait")
            self._check_order("writes", region, element, region.shadow.stored, "stored")
            self._check_order("writes", region, element, region.shadow.read, "read")
            if len(np.unique(element)) != len(element):
                raise BadAccess(f"{self.kernel}: one store writes an element of {region} more than once")
            if region.shadow.stored is None:
                region.shadow.stored = np.zeros(region.length, np.int64)
            region.shadow.stored[element] = self._stamp()
            self.stored.add(region.storage)
            self.stores_since_barrier = True
        return addresses

    def atomic(self, pointers: np.ndarray, mask: np.ndarray, sem: object) -> np.ndarray:
        region, element, addresses = self._elements("atomic", pointers, mask)
        if region is None:
            return addresses
        if not self.waited:
            raise BadAccess(f"{self.kernel}: {region} is written before gdc_wait")
        for address in element.tolist():
            known = self.released.setdefault(region.storage + address * region.itemsize, {})
            if sem in ACQUIRES:
                self.seen = _later(self.seen, known)
            if sem in RELEASES:
                if self.stores_since_barrier:
                    raise BadAccess(
                        f"{self.kernel}: a release without tl.debug_barrier before it: stores of other warps "
                        "may come after it"
                    )
                known.update(_later(known, self.seen))
                known[self.program] = self.clock + 1
        self._check_order("counts in", region, element, region.shadow.stored, "stored")
        self._mark_read(region, element)
        self.stored.add(region.storage)
        self.clock += sem in RELEASES
        return addresses

    # ---- checks

    def _elements(
        self, what: str, pointers: np.ndarray, mask: np.ndarray
    ) -> tuple[Region | None, np.ndarray, np.ndarray]:
        """The tensor accessed (None if every lane is masked), the elements of its storage, and all real addresses."""
        addresses = pointers & np.uint64((1 << ADDRESS_BITS) - 1)
        used = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        if used.size == 0:
            return None, used, addresses
        number = int(used[0]) >> ADDRESS_BITS
        if not 0 < number <= len(self.regions):
            raise BadAccess(f"{self.kernel}: {what} through a pointer to no argument")
        region = self.regions[number - 1]
        first = np.uint64(region.start + (number << ADDRESS_BITS))
        place = (used - first).view(np.int64) // region.itemsize
        out = (place < 0) | (place >= region.size)
        if out.any():
            raise BadAccess(
                f"{self.kernel}: {what} out of bounds of {region}: element {place[out][0]} in program {self.program}"
            )
        return region, place + region.shift, addresses

    def _stamp(self) -> int:
        return (self.program + 1) << 32 | self.clock << 16 | self.barriers

    def _check_order(
        self,
        does: str,
        region: Region,
        element: np.ndarray,
        stamps: np.ndarray | None,
        did: str,
        own: bool = False,
    ) -> None:
        if stamps is None:
            return
        for stamp in np.unique(stamps[element]).tolist():
            program, clock, barriers = (stamp >> 32) - 1, stamp >> 16 & 0xFFFF, stamp & 0xFFFF
            if program == self.program:
                if own and barriers == self.barriers:
                    raise BadAccess(
                        f"{self.kernel}: program {program} {does} {region} where it has {did} itself, and no "
                        "tl.debug_barrier is between"
                    )
            elif stamp and clock >= self.seen.get(program, 0):
                raise BadAccess(
                    f"{self.kernel}: race: program {self.program} {does} what program {program} has {did}, in "
                    f"{region}, and nothing orders the two"
                )

    def _mark_read(self, region: Region, element: np.ndarray) -> None:
        if region.length > 2**26:
            return  # weights: no kernel stores to anything as large here
        if region.shadow.read is None:
            region.shadow.read = np.zeros(region.length, np.int64)
        read = region.shadow.read
        new = element[read[element] == 0]
        read[new] = self._stamp()


def _later(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
    return {program: max(a.get(program, 0), b.get(program, 0)) for program in a.keys() | b.keys()}
