"""What the scripts that plant faults share: one at a time in a copy of the sources, and who notices it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str


def planted(fault: Fault, sources: Path, script: str) -> str:
    """The file with the fault; fails if the place it is for has changed."""
    text = (sources / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.file} has {text.count(fault.old)} places like {fault.old!r}, not one; "
            f"bring {script} up to date"
        )
    return text.replace(fault.old, fault.new)


def survivors(
    faults: list[Fault],
    plant: Callable[[Fault], str],
    sources: Path,
    copy: Path,
    first_failure: Callable[[Fault | None], str | None],
) -> list[str]:
    """Names of the faults that no test of the copy of the sources notices; prints each result."""
    if (failure := first_failure(None)) is not None:
        raise SystemExit(f"without any fault there is a failure: {failure}")
    surviving = []
    for fault in faults:
        (copy / fault.file).write_text(plant(fault))
        began = time.monotonic()
        failure = first_failure(fault)
        shutil.copy(sources / fault.file, copy / fault.file)
        surviving += [fault.name] if failure is None else []
        outcome = "SURVIVED" if failure is None else f"caught by {failure}"
        print(f"{fault.name} ({fault.file}, {time.monotonic() - began:.0f} s): {outcome}", flush=True)
    return surviving


def run(names: list[str], faults: list[Fault], find_survivors: Callable[[list[Fault]], list[str]]) -> None:
    """The faults of these names, or all; exits with 1 if one survives."""
    by_name = {fault.name: fault for fault in faults}
    for name in names:
        if name not in by_name:
            raise SystemExit(f"{name!r} is no fault; there are {', '.join(by_name)}")
    chosen = [by_name[name] for name in names] or faults
    surviving = find_survivors(chosen)
    print(f"{len(chosen) - len(surviving)} of {len(chosen)} faults caught")
    if surviving:
        raise SystemExit(f"survived: {', '.join(surviving)}")
