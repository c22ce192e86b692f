"""What nvcc makes of the CUDA kernels: registers, memory and instructions, without a GPU.

    python -m benchmarks.gpu.cubin_report --csv benchmarks/results/cubin.csv      writes it and a summary, cubin.md
    python -m benchmarks.gpu.cubin_report --check benchmarks/results/cubin.csv    compares every count with the file

Read from the objects that setup.py compiles for the extension, for the GPUs it compiles for by default; they are
compiled now where sources have changed since. ``loop`` is one of the loops that stream weights, ``pass`` the shortest
way once round it that asks for a chunk of weights and multiplies one: what a warp does for ``weight_bytes`` bytes.
These are counts, never speeds. Where ``loops`` of a kernel are alike it is the longest of theirs; all rows of a kernel
repeat its resources.

Held to limits, each violation a sentence and an exit code of 1:

- no spills and no local memory; at most 255 registers a thread; a block fits a multiprocessor
- every asynchronous copy brings 16 bytes; in a pass weights come by nothing else, and are multiplied by the tensor
  cores, but for the walk, which multiplies only what is stored
- a pass takes no longer than its weights take to arrive on an H100 at its data sheet's bandwidth: not to issue, of
  8.85 instructions of a lane per byte, and not in shared memory, whose banks give 128 bytes a clock. For 8 of 32
  numbers in bfloat16 the first is 5.5 instructions per expanded number, or 22 per stored one

Where nvcc is another than the file was made with, counts may differ and only limits are checked; where there is none,
only the file's.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from benchmarks.gpu.assembly import Block, Instruction, loops_by_header, sass_kernels, shortest_pass
from benchmarks.gpu.occupancy import UNITS, occupancy
from benchmarks.shapes import SHAPES
from benchmarks.tables import read_rows, write_rows
from resmoe_kernels.heuristics import GPUS

ROOT = Path(__file__).resolve().parents[2]
WARPS = 8  # of a block
MOST_PERCENT = {("scatter", "16"): 105}  # of what an H100's bandwidth allows; no GPU reaches its data sheet's
REGISTER_LIMIT = 255
COLUMNS = (
    "nvcc", "target", "kernel", "element", "tokens",
    "registers", "spills", "local", "static_shared", "dynamic_shared", "blocks", "occupancy_percent", "limited_by",
    "instructions", "copies", "wide_copies", "loop", "loops", "weight_bytes", "numbers",
    "pass_instructions", "pass_products", "pass_copies", "pass_loads", "pass_shared",
    "per_byte", "per_number", "issue_percent", "shared_percent",
)  # fmt: skip
KEY = ("target", "kernel", "element", "tokens", "loop")
MODELS = ("mixtral", "dsv2lite", "qwen3", "olmoe")
BLOCK = 8  # of 32

H100_GHZ = 1.755  # of its multiprocessors, under load
H100_BYTES_PER_CLOCK = GPUS["sm_90"].gb_per_s / GPUS["sm_90"].units / H100_GHZ  # of one multiprocessor: 14.5
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction of 32 lanes per clock
BANKS = 128  # bytes that shared memory gives, or takes, per clock


@dataclass(frozen=True)
class Loop:
    """A loop that streams weights, by what one pass of a warp does.

    nbytes: of weights;  numbers: that they expand to, where they are sparse
    products: instructions that multiply;  exactly, at_least: others, by patterns of their opcodes
    """

    name: str
    nbytes: int
    products: dict[str, int]
    at_least: dict[str, int]
    exactly: dict[str, int] = field(default_factory=dict)
    numbers: int = 0


def loops_of(kernel: str, tiles: int) -> tuple[Loop, ...]:
    """Of a kernel for so many tiles of 8 tokens. Activations are loaded from L1 or L2 (LDG) or shared memory."""
    hmma, ldg, copies = r"HMMA\..*", r"LDG\..*", r"LDGSTS\..*"
    if kernel == "low_rank_decode":
        strip, ranks = {r"LDS\.128": 4}, {r"LDSM\..*": 4}
        return (
            Loop("strip", 2048, {hmma: 4 * tiles}, {copies: 4, ldg: 2 * tiles}, strip),
            Loop("ranks", 2048, {hmma: 4 * tiles}, {copies: 4, ldg: tiles}, ranks),
        )
    nbytes, numbers = 64 * (4 + 2 * BLOCK), 64 * 32  # of 64 words of the mask, two to a lane
    if kernel == "walk":
        words, values = {copies: 3, "LDS": 2}, {r"LDS\.64": 2 * BLOCK // 4}
        return (
            Loop("base, one token", 1024, {"FFMA": 8}, {copies: 2, r"LDS\.128": 4}),
            Loop("base, two tokens", 1024, {"FFMA": 16}, {copies: 2, r"LDS\.128": 6}),
            Loop("expert, one token", nbytes, {"FFMA": 2 * BLOCK}, words, values, numbers),
            Loop("expert, two tokens", nbytes, {"FFMA": 4 * BLOCK}, words, values, numbers),
        )
    spread = {r"STS\.U16": 4 * BLOCK}  # each value to its place, and a zero after it
    return (
        Loop("base", 1024, {hmma: 2 * tiles}, {copies: 2, ldg: tiles}, {r"LDS\.128": 2}),
        Loop("expert", nbytes, {hmma: 8 * tiles}, {copies: 3, ldg: 4 * tiles}, spread, numbers),
    )


# ---- one cubin


NAME = re.compile(r"(low_rank_decode|walk|scatter)_kernelI(6__half|13__nv_bfloat16)(?:Li(\d)E)?")
MOST_TOKENS = {"low_rank_decode": (8, 16), "scatter": (8, 16), "walk": (2,)}


def facts(cubin: Path, target: str, nvcc: str, dynamic: dict[str, int]) -> Iterator[dict[str, str]]:
    """Rows of every kernel in a cubin. dynamic: bytes of shared memory that launches ask for."""
    listing, usage = _run(_tool("nvdisasm"), "-c", cubin), _run(_tool("cuobjdump"), "-res-usage", cubin)
    for mangled, blocks in sass_kernels(listing).items():
        match = NAME.search(mangled)
        if match is None:
            raise ValueError(
                f"cubin_report: {mangled} is a kernel that is not known here; NAME and loops_of say which are"
            )
        kernel, tiles = match[1], int(match[3] or 1)
        resources = re.search(rf"Function {mangled}:\s+(.*)", usage)[1]
        registers, stack, static, local = (
            int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "STACK", "SHARED", "LOCAL")
        )
        unit = UNITS[target]
        static -= unit.reserved if static and int(target.removeprefix("sm_")) >= 90 else 0  # counted since Hopper
        room = occupancy(target, WARPS, registers, static + dynamic[kernel])
        everything = [i for block in blocks for i in block.instructions]
        row = {
            "nvcc": nvcc,
            "target": target,
            "kernel": kernel,
            "element": "float16" if match[2] == "6__half" else "bfloat16",
            "tokens": MOST_TOKENS[kernel][tiles - 1],
            "registers": registers,
            "spills": sum(i.is_spill for i in everything),
            "local": stack + local,
            "static_shared": static,
            "dynamic_shared": dynamic[kernel],
            "blocks": room.blocks,
            "occupancy_percent": room.percent,
            "limited_by": ", ".join(room.limited_by),
            "instructions": len(everything),
            "copies": sum(i.is_async_copy for i in everything),
            "wide_copies": sum(i.is_async_copy and i.width == 16 for i in everything),
        }
        loops = loops_by_header(blocks)
        for loop in loops_of(kernel, tiles):
            yield dict.fromkeys(COLUMNS, "") | {name: str(v) for name, v in (row | counts(loop, blocks, loops)).items()}


def counts(loop: Loop, blocks: list[Block], loops: dict[int, frozenset[int]]) -> dict[str, object]:
    """Of one pass; where several loops of a kernel are like this one, of the longest."""
    passes = passes_of(loop, blocks, loops)
    if not passes:
        return {"loop": loop.name, "weight_bytes": loop.nbytes}
    longest = max(passes, key=len)
    shared, issue = loop.nbytes // BANKS + sum(map(_shared_clocks, longest)), len(longest) / SCHEDULERS
    arrives = loop.nbytes / H100_BYTES_PER_CLOCK
    return {
        "loop": loop.name,
        "loops": len(passes),
        "weight_bytes": loop.nbytes,
        "numbers": loop.numbers or "",
        "pass_instructions": len(longest),
        "pass_products": sum(loop.products.values()),
        "pass_copies": sum(i.is_async_copy for i in longest),
        "pass_loads": sum(i.stem == "LDG" for i in longest),
        "pass_shared": shared,
        "per_byte": f"{32 * len(longest) / loop.nbytes:.2f}",
        "per_number": f"{32 * len(longest) / loop.numbers:.2f}" if loop.numbers else "",
        "issue_percent": round(100 * issue / arrives),
        "shared_percent": round(100 * shared / arrives),
    }


def passes_of(loop: Loop, blocks: list[Block], loops: dict[int, frozenset[int]]) -> list[list[Instruction]]:
    """One pass of every loop that does what this one does, of those that multiply and are around none that do."""
    exactly, found = loop.products | loop.exactly, []
    (product,) = loop.products
    multiplies = {
        header: body for header, body in loops.items() if any(_count(blocks[b].instructions, product) for b in body)
    }
    for header, body in multiplies.items():
        if any(other < body for other in multiplies.values()):
            continue
        way = shortest_pass(blocks, header, body, exactly | loop.at_least)
        if way is not None and all(_count(way, opcode) == n for opcode, n in exactly.items()):
            found.append(way)
    return found


def _count(instructions: list[Instruction], pattern: str) -> int:
    return sum(re.fullmatch(pattern, i.opcode) is not None for i in instructions)


def _shared_clocks(i: Instruction) -> int:
    """Clocks of a multiprocessor's shared memory, for 32 lanes and without conflicts."""
    if i.stem == "LDSM":
        return int(i.opcode.rpartition(".")[2])
    return max(1, 32 * i.width // BANKS) if i.stem in ("LDS", "STS") else 0


# ---- all of them


def compiled() -> list[dict[str, str]] | str:
    """Every row, sorted; or why nothing can be compiled here."""
    os.chdir(ROOT)
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    setup = _setup()
    cuda = setup.find_cuda("auto")
    if isinstance(cuda, str):
        return cuda
    objects = setup.compile_cuda(cuda)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        memory = Path(folder, "launch_memory")
        source = ROOT / "benchmarks" / "gpu" / "launch_memory.cu"
        _run(cuda.nvcc, "-std=c++20", f"-arch=sm_{setup.OLDEST_GPU}", "-Icsrc", source, "-o", memory)
        for file in objects:
            _run(_tool("cuobjdump"), "-xelf", "all", Path(file).resolve(), cwd=folder)
        cubins = [path for path in sorted(Path(folder).glob("*.cubin")) if not path.name.startswith("device")]

        def read(path: Path) -> list[dict[str, str]]:
            target = path.suffixes[-2].removeprefix(".")
            return list(facts(path, target, cuda.version, _dynamic_shared(memory, target)))

        rows = [row for part in pool.map(read, cubins) for row in part]
    return sorted(rows, key=lambda row: (list(UNITS).index(row["target"]), *(row[name].zfill(2) for name in KEY[1:])))


def _setup() -> ModuleType:
    specification = importlib.util.spec_from_file_location("resmoe_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(setup)
    return setup


def _dynamic_shared(program: Path, target: str) -> dict[str, int]:
    """Bytes by kernel, the most that one of the models takes at as many tokens as a kernel serves."""
    unit, numbers = UNITS[target], []
    for tokens, model in itertools.product((1, 2), MODELS):
        shape = SHAPES[model]
        numbers += [tokens, shape.top_k, shape.hidden_size, shape.intermediate_size, BLOCK]
    words = _run(
        program, f"{target.removeprefix('sm_')}0", f"{unit.shared - unit.reserved}", *map(str, numbers)
    ).split()
    return {name.removesuffix("_kernel"): int(size) for name, size in zip(words[::2], words[1::2], strict=True)}


def _tool(name: str) -> str:
    from triton import knobs  # the toolkit here may have none of them; Triton's wheel does

    return getattr(knobs.nvidia, name).path


def _run(*command: object, cwd: str | Path = ROOT) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, cwd=cwd).stdout


# ---- limits, comparison


def violations(row: dict[str, str]) -> list[str]:
    """A sentence for every limit that a row breaks."""
    unit, broken = UNITS[row["target"]], []
    shared = int(row["static_shared"]) + int(row["dynamic_shared"])
    if row["spills"] != "0" or row["local"] != "0":
        broken.append(f"{row['spills']} instructions spill registers, {row['local']} bytes of local memory; none may")
    if int(row["registers"]) > REGISTER_LIMIT:
        broken.append(f"{row['registers']} registers per thread; at most {REGISTER_LIMIT} are there")
    if shared > unit.shared - unit.reserved:
        broken.append(f"{shared} bytes of shared memory; a block has at most {unit.shared - unit.reserved}")
    elif row["blocks"] == "0":
        broken.append(f"no block fits a multiprocessor, for {row['limited_by']}")
    if row["wide_copies"] != row["copies"]:
        broken.append(f"{row['wide_copies']} of {row['copies']} asynchronous copies bring 16 bytes; all must")
    if not row["pass_instructions"]:
        broken.append("no loop has a pass with its copies, reads and products, as loops_of says what they are")
        return [f"{name_of(row)}: {sentence}" for sentence in broken]
    most = MOST_PERCENT.get((row["kernel"], row["tokens"]), 100)
    if int(row["issue_percent"]) > most:
        each = f"{row['per_byte']} per byte" + f", {row['per_number']} per expanded number" * bool(row["numbers"])
        broken.append(f"{row['pass_instructions']} instructions in a pass, {each}: {_too_long(row, 'issue', most)}")
    if int(row["shared_percent"]) > most:
        broken.append(f"{row['pass_shared']} clocks of shared memory in a pass: {_too_long(row, 'shared', most)}")
    return [f"{name_of(row)}: {sentence}" for sentence in broken]


def _too_long(row: dict[str, str], what: str, most: int) -> str:
    percent = row[f"{what}_percent"]
    return f"{percent} % of the time its {row['weight_bytes']} bytes take to arrive on an H100; at most {most} %"


def name_of(row: dict[str, str]) -> str:
    return f"{row['target']} {row['kernel']} [{row['element']}, {row['tokens']} tokens] {row['loop']}"


def compared(rows: list[dict[str, str]], kept: list[dict[str, str]], file: str) -> list[str]:
    """A sentence for every limit broken and every difference between what is compiled now and a file's rows."""
    sentences = [sentence for row in rows for sentence in violations(row)]
    made_with = {row["nvcc"] for row in kept}
    if made_with != {row["nvcc"] for row in rows}:
        print(f"{file} was made with nvcc {', '.join(sorted(made_with))}, this is {rows[0]['nvcc']}: limits only")
        return sentences
    again = f"; run python -m benchmarks.gpu.cubin_report --csv {file}"
    now, before = ({tuple(row[name] for name in KEY): row for row in some} for some in (rows, kept))
    for key in now.keys() | before.keys():
        if key not in before or key not in now:
            where = f"compiled and not in {file}" if key in now else f"in {file} and no longer compiled"
            sentences.append(f"{name_of(now.get(key) or before[key])} is {where}{again}")
            continue
        differences = [
            f"{name} {old!r} is now {new!r}"
            for name in COLUMNS
            if (old := before[key][name]) != (new := now[key][name])
        ]
        if differences:
            sentences.append(f"{name_of(now[key])}: {', '.join(differences)}{again}")
    return sorted(sentences)


# ---- the files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--csv", type=Path, metavar="FILE", help="write FILE and a summary, FILE.md")
    action.add_argument("--check", type=Path, metavar="FILE", help="compare with FILE")
    arguments = parser.parse_args()
    file = (arguments.csv or arguments.check).resolve()
    rows = compiled()
    if isinstance(rows, str):
        if arguments.csv:
            parser.error(f"--csv compiles the CUDA kernels: {rows}")
        kept = read_rows(file)
        print(f"cubin_report: nothing is compiled here, as {rows}; limits of {arguments.check} only")
        sentences = [sentence for row in kept for sentence in violations(row)]
        rows = kept
    elif arguments.csv:
        write_rows(file, rows, COLUMNS)
        file.with_suffix(".md").write_text(summary(rows))
        sentences = [sentence for row in rows for sentence in violations(row)]
    else:
        sentences = compared(rows, read_rows(file), str(arguments.check))
    for sentence in sentences:
        print(sentence)
    print(f"cubin_report: {len(rows)} loops of kernels, {len(sentences)} complaints")
    return 1 if sentences else 0


def summary(rows: list[dict[str, str]]) -> str:
    """The rows in bfloat16 as Markdown; those in float16 differ little."""
    lines = [
        "# What nvcc makes of the CUDA kernels",
        "",
        f"Written by `benchmarks/gpu/cubin_report.py` with nvcc {rows[0]['nvcc']}, from `cubin.csv` beside it, for "
        "bfloat16; compiled without a GPU. Counts, not speeds. A pass is the shortest way once round a loop that asks "
        "for a chunk of weights and multiplies one. Percentages are of the time in which its weights arrive on an "
        f"H100 at its data sheet's {GPUS['sm_90'].gb_per_s} GB/s, {H100_BYTES_PER_CLOCK:.1f} bytes per clock "
        f"({H100_GHZ} GHz) and multiprocessor: to issue its instructions, one per clock and scheduler, and to move its "
        f"bytes through shared memory, {BANKS} per clock. A GPU with twice an H100's bandwidth leaves half the time.",
    ]
    head = ("kernel", "tokens", "registers", "shared KiB", "blocks per SM", "spills", "instructions", "loop",
            "bytes of weights", "instructions of a pass", "products", "asynchronous copies", "per byte", "per number",
            "issue %", "shared %")  # fmt: skip
    for target in dict.fromkeys(row["target"] for row in rows):
        lines += ["", f"## {target}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in rows:
            if row["target"] != target or row["element"] != "bfloat16":
                continue
            shared = (int(row["static_shared"]) + int(row["dynamic_shared"])) >> 10
            names = ("blocks", "spills", "instructions", "loop", "weight_bytes", "pass_instructions", "pass_products",
                     "pass_copies", "per_byte", "per_number", "issue_percent", "shared_percent")  # fmt: skip
            first = (f"`{row['kernel']}`", row["tokens"], row["registers"], str(shared))
            lines.append(f"| {' | '.join([*first, *(row[name] for name in names)])} |".replace("|  |", "| |"))
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
