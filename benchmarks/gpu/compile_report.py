"""What the compilers make of every Triton kernel: registers, memory and instructions, without a GPU.

    python -m benchmarks.gpu.compile_report --csv benchmarks/results/compile.csv     every configuration; writes it
    python -m benchmarks.gpu.compile_report --check benchmarks/results/compile.csv    a subset, compared with the file

A configuration is a kernel with its constants, tile sizes and specialised argument types, as a real call starts it:
launches of ``triton_kernels.experts`` are written down (``recorded``) for four real model shapes, every form and T = 1
... 4096, on tensors without memory, and compiled through Triton's own ``warmup`` for GPUs that are not there. What
comes back is read from the machine code; these are counts, never speeds. ``main loop`` is the innermost loop with
matrix products that loads most bytes.

Held to limits, each violation a sentence and an exit code of 1:

- no spills in a loop, and elsewhere at most SPILLS_ONCE instructions: ptxas keeps a value or two in memory, once per
  program, where that makes room for one more block (at 96, 128 or 168 registers)
- at most 255 registers a thread; a block fits a multiprocessor
- products of 16-bit operands run on tensor cores
- on NVIDIA every load in a loop of products is an asynchronous copy, but for those of a sparse tile, which is expanded
  in registers. For AMD's gfx942 Triton loads the next step to registers: no asynchronous copies are expected

``--check`` writes down every launch again and finds configurations that came or went, and kernels whose source changed
since the file was made; of each kernel and target it compiles SUBSET configurations and compares every count. Where
Triton's version is not the file's, counts may differ and only limits are checked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import triton
from triton import knobs

from benchmarks.gpu.assembly import Block, Instruction, amd_blocks, loops, product_loops, sass_blocks
from benchmarks.gpu.configurations import KEY, TARGETS, Configuration, cases, configurations, pretending, warmup
from benchmarks.gpu.occupancy import UNITS, occupancy
from benchmarks.tables import read_rows, write_rows

CACHE = Path(__file__).resolve().parents[2] / "build" / "triton"
SUBSET = 2
SPILLS_ONCE = 16
HAVE_A_SLOW_LOOP = ("prefill_gate_up", "prefill_down")  # for ranks beyond min(N, K), which are legal and of no use
REGISTER_LIMIT = {"nvidia": 255, "amd": 512}
COLUMNS = (
    "triton", "target", "kernel", "warps", "stages", "constants", "arguments", "source", "launched_by",
    "registers", "spills", "loop_spills", "shared", "tensor_columns", "blocks", "occupancy_percent", "limited_by",
    "instructions", "dots", "products", "async_copies", "popcounts",
    "loops", "async_loops", "main_instructions", "main_products", "main_popcounts", "main_bytes", "main_async_bytes",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", help="only these (default: all)")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--csv", type=Path, metavar="FILE", help="compile everything, write FILE and a summary, FILE.md"
    )
    action.add_argument("--check", type=Path, metavar="FILE", help="compare with FILE")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))

    found = [
        configuration
        for target in arguments.target
        for configuration in configurations(target, cases())
        if not arguments.kernel or configuration.key[1] in arguments.kernel
    ]
    if not found:
        parser.error(f"--kernel: the op starts no kernel named {', '.join(arguments.kernel)}")
    if arguments.csv:
        rows = compiled(found)
        write_rows(arguments.csv, rows, COLUMNS)
        arguments.csv.with_suffix(".md").write_text(summary(rows))
        sentences = [sentence for row in rows for sentence in violations(row)]
    else:
        kept = [row for row in read_rows(arguments.check) if row["target"] in arguments.target]
        kept = [row for row in kept if not arguments.kernel or row["kernel"] in arguments.kernel]
        rows = compiled(subset(found))
        sentences = compared(found, rows, kept, str(arguments.check))
    for sentence in sentences:
        print(sentence)
    print(f"compile_report: {len(rows)} of {len(found)} configurations compiled, {len(sentences)} complaints")
    return 1 if sentences else 0


# ---- what the compiler made of it


def facts(configuration: Configuration) -> dict[str, str]:
    """One row of the file."""
    with pretending(configuration.target):
        kernel = warmup(configuration.launch)
    row = dict(zip(KEY, configuration.key, strict=True))
    row |= {"triton": triton.__version__, "source": configuration.source}
    first, *others = configuration.launched_by
    row["launched_by"] = first + (f" and {len(others)} more" if others else "")
    return row | {name: str(value) for name, value in read(kernel, configuration.target).items()}


def read(kernel: object, target: str) -> dict[str, object]:
    """Counts from a compiled kernel's machine code; registers per thread, shared memory in bytes per block."""
    metadata, asm = kernel.metadata, kernel.asm
    blocks, registers, static = _amd(asm["amdgcn"]) if "amdgcn" in asm else _nvidia(asm["cubin"], target)
    everything = [i for block in blocks for i in block.instructions]
    shared = metadata.shared + static
    columns = getattr(metadata, "tmem_size", 0) or 0
    room = occupancy(target, metadata.num_warps, registers, shared, columns)
    in_loops = [i for b in set().union(*loops(blocks)) for i in blocks[b].instructions]
    multiplying = product_loops(blocks) if "tt.dot" in asm["ttir"] else []
    main = max(multiplying, key=_loaded, default=[])
    return {
        "registers": registers,
        "spills": sum(i.is_spill for i in everything),
        "loop_spills": sum(i.is_spill for i in in_loops),
        "shared": shared,
        "tensor_columns": columns,
        "blocks": room.blocks,
        "occupancy_percent": room.percent,
        "limited_by": ", ".join(room.limited_by),
        "instructions": len(everything),
        "dots": len(re.findall(r"tt\.dot .*: tensor<\w+x(?:bf16|f16)> \*", asm["ttir"])),
        "products": _listed(i.stem for i in everything if i.is_matrix_product),
        "async_copies": sum(i.is_async_copy for i in everything),
        "popcounts": sum(i.is_popcount for i in everything),
        "loops": len(multiplying),
        "async_loops": sum(_is_asynchronous(loop) for loop in multiplying),
        "main_instructions": len(main),
        "main_products": _listed(i.stem for i in main if i.is_matrix_product or i.is_multiply_add),
        "main_popcounts": sum(i.is_popcount for i in main),
        "main_bytes": _loaded(main),
        "main_async_bytes": _loaded([i for i in main if i.is_async_copy]),
    }


def _is_asynchronous(loop: list[Instruction]) -> bool:
    """Whether it copies asynchronously; a loop that expands no sparse tile must do nothing else."""
    kinds = {i.is_async_copy for i in loop if i.is_global_load}
    return kinds == {True} or (True in kinds and any(i.is_popcount for i in loop))


def _loaded(loop: list[Instruction]) -> int:
    """Bytes that one thread loads from global memory in one pass."""
    return sum(i.width for i in loop if i.is_global_load)


def _listed(names: Iterable[str]) -> str:
    return " ".join(f"{name}:{count}" for name, count in sorted(Counter(names).items()))


def _nvidia(cubin: bytes, target: str) -> tuple[list[Block], int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # -ndf: without dataflow analysis, in half the time
        listing = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    registers, static = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "SHARED"))
    reserved = UNITS[target].reserved if int(target.removeprefix("sm_")) >= 90 else 0  # counted as used since Hopper
    return sass_blocks(listing), registers, max(0, static - reserved)


def _amd(text: str) -> tuple[list[Block], int, int]:
    registers, static = (
        int(re.search(rf"^; {name}: (\d+)", text, re.MULTILINE)[1]) for name in ("TotalNumVgprs", "LDSByteSize")
    )
    return amd_blocks(text), registers, static


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- limits, comparison


def violations(row: dict[str, str]) -> list[str]:
    """A sentence for every limit that a row breaks."""
    nvidia = row["target"].startswith("sm_")
    unit, limit = UNITS[row["target"]], REGISTER_LIMIT["nvidia" if nvidia else "amd"]
    broken = []
    if row["loop_spills"] != "0":
        broken.append(f"{row['loop_spills']} instructions in loops spill registers; none may")
    elif int(row["spills"]) > SPILLS_ONCE:
        broken.append(f"{row['spills']} instructions spill registers; at most {SPILLS_ONCE} may, outside of loops")
    if int(row["registers"]) > limit:
        broken.append(f"{row['registers']} registers per thread; at most {limit} are there")
    if int(row["shared"]) > unit.shared - unit.reserved:
        broken.append(f"{row['shared']} bytes of shared memory; a block has at most {unit.shared - unit.reserved}")
    elif row["blocks"] == "0":
        broken.append(f"no block fits a multiprocessor, for {row['limited_by']}")
    if row["dots"] != "0" and not row["products"]:
        broken.append("its 16-bit products do not run on tensor cores")
    if nvidia:
        loaded, asynchronous = row["main_bytes"], row["main_async_bytes"]
        if asynchronous != loaded and (row["main_popcounts"] == "0" or asynchronous == "0"):
            broken.append(
                f"{asynchronous} of {loaded} bytes of its main loop are loaded asynchronously; all must be, but for "
                "those of a sparse tile"
            )
        elif row["async_loops"] != row["loops"] and row["kernel"] not in HAVE_A_SLOW_LOOP:
            broken.append(f"of its {row['loops']} loops of products {row['async_loops']} load asynchronously; all must")
    return [f"{name_of(row)}: {sentence}" for sentence in broken]


def name_of(row: dict[str, str]) -> str:
    return (
        f"{row['target']} {row['kernel']} [{row['constants']}; {row['warps']} warps, {row['stages']} stages]"
        f" of {row['launched_by']}"
    )


def subset(found: list[Configuration]) -> list[Configuration]:
    """SUBSET configurations of every kernel and target, spread over the sorted list of them."""
    chosen = []
    for target, kernel in sorted({(c.target, c.key[1]) for c in found}):
        of_kernel = [c for c in found if (c.target, c.key[1]) == (target, kernel)]
        count = min(SUBSET, len(of_kernel))
        chosen += [of_kernel[i * len(of_kernel) // count] for i in range(count)]
    return chosen


def compared(found: list[Configuration], rows: list[dict], kept: list[dict], file: str) -> list[str]:
    """A sentence for every limit broken and every difference: what is launched now, the subset compiled now, a file's
    rows."""
    sentences = [sentence for row in rows for sentence in violations(row)]
    again = f"; run python -m benchmarks.gpu.compile_report --csv {file}"
    made_with = {row["triton"] for row in kept}
    if made_with - {triton.__version__}:
        print(f"{file} was made with Triton {', '.join(sorted(made_with))}, this is {triton.__version__}: limits only")
        return sentences
    by_key = {tuple(row[name] for name in KEY): row for row in kept}
    now = {c.key: c for c in found}
    compiled_now = {tuple(row[name] for name in KEY): row for row in rows}
    for key in sorted(now.keys() - by_key.keys()):
        sentences.append(f"{' '.join(key[:2])} [{key[4]}; {key[5]}] is launched and not in {file}{again}")
    for key in sorted(by_key.keys() - now.keys()):
        sentences.append(f"{' '.join(key[:2])} [{key[4]}; {key[5]}] is in {file} and no longer launched{again}")
    for key in sorted(now.keys() & by_key.keys()):
        old, new = by_key[key], compiled_now.get(key, {"source": now[key].source})
        differences = [
            f"{name} {old[name]!r} is now {new[name]!r}" for name in COLUMNS if new.get(name, old[name]) != old[name]
        ]
        if differences:
            sentences.append(f"{name_of(old)}: {', '.join(differences)}{again}")
        if key not in compiled_now:
            sentences += violations(old)
    return sentences


# ---- the files


def compiled(found: list[Configuration]) -> list[dict[str, str]]:
    """Rows of configurations, in their order."""
    # Forked with the list: launches hold kernels, which cannot be sent. One at a time: some take ten times as long.
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), _share, (found,)) as pool:
        return pool.map(_facts, range(len(found)), chunksize=1)


_found: list[Configuration] = []


def _share(found: list[Configuration]) -> None:
    _found[:] = found


def _facts(i: int) -> dict[str, str]:
    return facts(_found[i])


def summary(rows: list[dict[str, str]]) -> str:
    """The rows by target and kernel, as Markdown."""
    lines = [
        "# What the compilers make of the Triton kernels",
        "",
        f"Written by `benchmarks/gpu/compile_report.py` with Triton {rows[0]['triton']}, from `compile.csv` beside it: "
        f"{len(rows)} configurations, compiled without a GPU. Counts, not speeds. Ranges are over the configurations "
        "of a kernel; instructions, products and bytes that a thread loads are of one pass of the main loop. "
        "Kernels without matrix products have no main loop here.",
    ]
    head = ("kernel", "configurations", "registers", "shared KiB", "blocks per SM", "occupancy %", "spills", "in loops",
            "instructions", "of them products", "bytes", "of them asynchronous", "popcounts")  # fmt: skip
    for target in dict.fromkeys(row["target"] for row in rows):
        lines += ["", f"## {target}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for kernel in sorted({row["kernel"] for row in rows if row["target"] == target}):
            of = [row for row in rows if (row["target"], row["kernel"]) == (target, kernel)]
            multiply = [row for row in of if row["loops"] != "0"]
            opcodes = {part.split(":")[0] for row in multiply for part in row["main_products"].split()}
            cells = (
                f"`{kernel}`", len(of), _range(of, "registers"), _range(of, "shared", 1024), _range(of, "blocks"),
                _range(of, "occupancy_percent"), _range(of, "spills"), _range(of, "loop_spills"),
                _range(multiply, "main_instructions"),
                f"{' '.join(sorted(opcodes))} {_range(multiply, 'main_products')}", _range(multiply, "main_bytes"),
                _range(multiply, "main_async_bytes"), _range(of, "popcounts"),
            )  # fmt: skip
            lines.append(f"| {' | '.join(str(cell).strip() for cell in cells)} |")
    return "\n".join([*lines, ""])


def _range(rows: list[dict[str, str]], column: str, unit: int = 1) -> str:
    """Least and most of a column, of "name:count" the counts."""
    numbers = [sum(int(part.split(":")[-1]) for part in row[column].split()) // unit for row in rows]
    least, most = min(numbers, default=None), max(numbers, default=None)
    return "" if least is None else str(least) if least == most else f"{least}–{most}"


if __name__ == "__main__":
    sys.exit(main())
