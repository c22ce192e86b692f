"""The report of CUDA cubins: passes are read right, limits can be broken, a file that is out of date is noticed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import assembly, cubin_report
from tests.conftest import REPO

COMMITTED = REPO / "benchmarks" / "results" / "cubin.csv"
REPORTS = (REPO / "benchmarks" / "gpu" / "reports.md").read_text()
ROWS = cubin_report.read_rows(COMMITTED)


# ---- a listing and what is read from it

STRIP = ["LDG.E.128.STRONG.GPU"] * 2 + ["LDGSTS.E.BYPASS.128"] * 4 + ["LDS.128"] * 4 + ["HMMA.16816.F32.BF16"] * 4
RANKS = ["LDG.E.128.STRONG.GPU"] + ["LDGSTS.E.BYPASS.128"] * 4 + ["LDSM.16.MT88.4"] * 4 + ["HMMA.16816.F32.BF16"] * 4
NAME = "_ZN6resmoe4cuda22low_rank_decode_kernelI13__nv_bfloat16Li1EEEvNS0_11LowRankCallE"


def listing(*loops: list[str], name: str = NAME) -> str:
    """As nvdisasm prints it: loops one after another within a loop over tasks, each with a rare way past its copies."""
    lines = [f'\t.section\t.text.{name},"ax",@progbits', ".L_x_0:", "IADD3"]
    for i, loop in enumerate(loops):
        others = [opcode for opcode in loop if not opcode.startswith("LDGSTS")]
        copies = [opcode for opcode in loop if opcode.startswith("LDGSTS")]
        lines += [f".L_x_{i}1:", f"@P0 BRA `(.L_x_{i}2)", *copies, f".L_x_{i}2:", *others, f"@P1 BRA `(.L_x_{i}1)"]
    lines += ["@P2 BRA `(.L_x_0)", "EXIT"]
    return "\n".join(x if x[0] in "\t." else f"        /*0000*/              {x} ;" for x in lines)


@pytest.fixture
def facts(monkeypatch):
    """facts(loops, ...): the rows of a cubin of one kernel, by loop."""

    def read(*loops: list[str], registers: int = 126, local: int = 0, shared: int = 1024, name: str = NAME) -> dict:
        usage = f" Function {name}:\n  REG:{registers} STACK:0 SHARED:{shared} LOCAL:{local} CONSTANT[0]:704"
        texts = {"nvdisasm": listing(*loops, name=name), "cuobjdump": usage}
        monkeypatch.setattr(cubin_report, "_tool", lambda tool: tool)
        monkeypatch.setattr(cubin_report, "_run", lambda tool, *_: texts[tool])
        rows = cubin_report.facts(Path("c"), "sm_90", "13.0", {"low_rank_decode": 200 << 10})
        return {row["loop"]: row for row in rows}

    return read


def complaints(rows: dict) -> list[str]:
    return [sentence.split(": ", 1)[1] for row in rows.values() for sentence in cubin_report.violations(row)]


def test_what_is_read_of_a_kernel(facts):
    rows = facts(STRIP, RANKS, [*STRIP, "IADD3"])
    assert rows.keys() == {"strip", "ranks"} and complaints(rows) == []
    strip = rows["strip"]
    assert (strip["kernel"], strip["element"], strip["tokens"]) == ("low_rank_decode", "bfloat16", "8")
    # Two branches beside; the longer of two loops that are alike. Four 16-byte reads take four clocks each.
    assert strip["pass_instructions"] == str(len(STRIP) + 1 + 2)
    assert (strip["pass_products"], strip["pass_copies"], strip["pass_loads"]) == ("4", "4", "2")
    assert (strip["pass_shared"], rows["ranks"]["pass_shared"]) == (str(2048 // 128 + 4 * 4),) * 2
    assert strip["per_byte"] == f"{32 * 17 / 2048:.2f}" and strip["per_number"] == ""
    # 17 instructions are 4.25 clocks of a scheduler; 2048 bytes arrive in 2048 / 14.46.
    assert strip["issue_percent"] == str(round(100 * 4.25 / (2048 / 14.46)))
    assert (strip["static_shared"], strip["dynamic_shared"]) == ("0", str(200 << 10))  # 1024 are the hardware's
    assert (strip["blocks"], strip["limited_by"]) == ("1", "shared memory")
    assert (strip["copies"], strip["wide_copies"]) == ("12", "12")


BROKEN = [
    ({"local": 8}, "0 instructions spill registers, 8 bytes of local memory; none may"),
    ({"registers": 256}, "256 registers per thread; at most 255 are there"),
    ({"shared": 29 << 10}, "233472 bytes of shared memory; a block has at most 232448"),
]
CHANGED = [
    (lambda loop: [*loop, "LDL", "STL"], "2 instructions spill registers, 0 bytes of local memory; none may"),
    (lambda loop: [*loop, "LDGSTS.E.64"], "8 of 9 asynchronous copies bring 16 bytes; all must"),
    (lambda loop: loop + ["IADD3"] * 600, "616 instructions in a pass, 9.62 per byte: 109 % of the time its 2048 bytes "
     "take to arrive on an H100; at most 100 %"),
    (lambda loop: loop + ["STS.128"] * 28, "144 clocks of shared memory in a pass: 102 % of the time "
     "its 2048 bytes take to arrive on an H100; at most 100 %"),
    (lambda loop: [o for o in loop if "HMMA" not in o], "no loop has a pass with its copies, reads and products"),
    (lambda loop: loop[3:], "no loop has a pass with its copies, reads and products"),  # weights by other loads
    (lambda loop: [o.replace("LDGSTS.E.BYPASS.128", "LDG.E.128") for o in loop], "no loop has a pass with its copies"),
]  # fmt: skip


@pytest.mark.parametrize("change, sentence", BROKEN)
def test_resources_beyond_their_limits(facts, change, sentence):
    assert set(complaints(facts(STRIP, RANKS, **change))) == {sentence}


@pytest.mark.parametrize("change, sentence", CHANGED)
def test_loops_that_lose_what_they_need(facts, change, sentence):
    found = complaints(facts(change(STRIP), RANKS))
    assert any(s.startswith(sentence) for s in found), found
    assert complaints(facts(STRIP, RANKS)) == []


def test_a_kernel_that_is_not_known(facts):
    with pytest.raises(
        ValueError, match="cubin_report: gemm is a kernel that is not known here; NAME and loops_of say"
    ):
        facts(STRIP, name="gemm")


# ---- limits


def test_the_budget_is_that_of_an_h100():
    """3.35 TB/s, 132 multiprocessors of 4 schedulers, 1.755 GHz: 8.85 instructions of a lane per byte."""
    budget = 32 * cubin_report.SCHEDULERS / cubin_report.H100_BYTES_PER_CLOCK
    assert budget == pytest.approx(8.85, abs=0.005)
    (expert,) = (x for x in cubin_report.loops_of("scatter", 1) if x.name == "expert")
    per_number = budget * expert.nbytes / expert.numbers
    assert per_number == pytest.approx(5.5, abs=0.05) and 4 * per_number == pytest.approx(22, abs=0.2)


def test_every_limit_has_a_sentence():
    row = dict(ROWS[0], blocks="0", limited_by="registers")
    name = cubin_report.name_of(row)
    assert name == "sm_80 low_rank_decode [bfloat16, 8 tokens] ranks"
    assert cubin_report.violations(row) == [f"{name}: no block fits a multiprocessor, for registers"]
    row = next(row for row in ROWS if row["kernel"] == "scatter" and row["tokens"] == "16" and row["numbers"])
    over = dict(row, pass_instructions="400", issue_percent="113", per_byte="10.00", per_number="6.25")
    (sentence,) = cubin_report.violations(over)
    assert sentence.endswith(
        "400 instructions in a pass, 10.00 per byte, 6.25 per expanded number: 113 % of the time its 1280 bytes take "
        "to arrive on an H100; at most 105 %"
    )


# ---- comparison


def compared(rows: list[dict], kept: list[dict]) -> list[str]:
    return cubin_report.compared(rows, kept, "FILE")


def test_a_file_that_matches():
    assert compared(ROWS, ROWS) == []


def test_differences_are_named():
    again = "; run python -m benchmarks.gpu.cubin_report --csv FILE"
    name = cubin_report.name_of(ROWS[0])
    changed = [dict(ROWS[0], registers="1", blocks="9"), *ROWS[1:]]
    (sentence,) = compared(ROWS, changed)
    now = ROWS[0]
    assert sentence == f"{name}: registers '1' is now '{now['registers']}', blocks '9' is now '{now['blocks']}'{again}"
    assert compared(ROWS, ROWS[1:]) == [f"{name} is compiled and not in FILE{again}"]
    assert compared(ROWS[1:], ROWS) == [f"{name} is in FILE and no longer compiled{again}"]


def test_another_nvcc_checks_limits_only(capsys):
    other = [dict(row, nvcc="12.4", registers="1") for row in ROWS]
    assert compared(ROWS, other) == []
    assert capsys.readouterr().out == f"FILE was made with nvcc 12.4, this is {ROWS[0]['nvcc']}: limits only\n"
    (sentence,) = compared([dict(ROWS[0], registers="256"), *ROWS[1:]], other)
    assert sentence.endswith("256 registers per thread; at most 255 are there")


def test_without_nvcc_the_files_limits_are_checked_and_it_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cubin_report, "compiled", lambda: "nvcc was not found")
    file = tmp_path / "c.csv"
    cubin_report.write_rows(file, [*ROWS[:3], dict(ROWS[3], spills="2")], cubin_report.COLUMNS)
    monkeypatch.setattr(sys, "argv", ["cubin_report.py", "--check", str(file)])
    assert cubin_report.main() == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == f"cubin_report: nothing is compiled here, as nvcc was not found; limits of {file} only"
    assert "2 instructions spill registers" in second and last == "cubin_report: 4 loops of kernels, 1 complaints"
    monkeypatch.setattr(sys, "argv", ["cubin_report.py", "--csv", str(file)])
    with pytest.raises(SystemExit):
        cubin_report.main()
    assert "--csv compiles the CUDA kernels: nvcc was not found" in capsys.readouterr().err


def test_a_file_is_written_with_its_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(cubin_report, "compiled", lambda: ROWS)
    monkeypatch.setattr(sys, "argv", ["cubin_report.py", "--csv", str(tmp_path / "c.csv")])
    assert cubin_report.main() == 0
    assert (tmp_path / "c.csv").read_text() == COMMITTED.read_text()
    assert (tmp_path / "c.md").read_text() == COMMITTED.with_suffix(".md").read_text()


# ---- the committed file


def test_the_committed_file_has_every_kernel_and_target_within_limits():
    assert [sentence for row in ROWS for sentence in cubin_report.violations(row)] == []
    keys = {tuple(row[name] for name in ("target", "kernel", "element", "tokens", "loop")) for row in ROWS}
    assert keys == {
        (target, kernel, element, str(tokens), loop.name)
        for target in ("sm_80", "sm_89", "sm_90", "sm_100")
        for kernel, most in cubin_report.MOST_TOKENS.items()
        for element in ("bfloat16", "float16")
        for tiles, tokens in enumerate(most, 1)
        for loop in cubin_report.loops_of(kernel, tiles)
    }
    assert len(keys) == len(ROWS)


def test_numbers_in_the_readme_are_the_files():
    """Lane instructions per byte of weights and per expanded number, on sm_90 in bfloat16."""
    shown = re.findall(r"^\| `(\w+)`, (\d+) tokens?, ([\w, ]+) \| ([\d.]+) \| ([\d.]*) \|", REPORTS, re.MULTILINE)
    rows = {
        (row["kernel"], row["tokens"], row["loop"]): (row["per_byte"], row["per_number"])
        for row in ROWS
        if (row["target"], row["element"]) == ("sm_90", "bfloat16")
    }
    assert len(shown) == len(rows)
    for kernel, tokens, loop, per_byte, per_number in shown:
        assert rows[kernel, tokens, loop] == (per_byte, per_number), (kernel, tokens, loop)


def test_what_a_walk_takes_is_worked_out_by_the_code(tmp_path):
    """benchmarks/gpu/launch_memory.cu compiles and says what persistent.py assumes."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    program, source = tmp_path / "memory", REPO / "benchmarks" / "gpu" / "launch_memory.cu"
    subprocess.run([nvcc, "-std=c++20", "-arch=sm_80", "-Icsrc", source, "-o", program], check=True, cwd=REPO)
    import torch

    from benchmarks.gpu import persistent
    from benchmarks.shapes import SHAPES, layer_sizes

    answers = set()
    for model in cubin_report.MODELS:
        for tokens in (1, 2, 3):
            shape = SHAPES[model]
            sizes = (tokens, shape.top_k, shape.hidden_size, shape.intermediate_size, 8)
            out = subprocess.run([program, "900", str(227 << 10), *map(str, sizes)], capture_output=True, text=True)
            walked = "walk_kernel 0" not in out.stdout
            index = torch.zeros(tokens, shape.top_k, dtype=torch.int64)
            assert persistent._is_walked(layer_sizes(shape, "block", 0.25), index, "sm_90") == walked, (model, tokens)
            answers.add((tokens, walked))
    assert answers == {(1, True), (2, True), (2, False), (3, False)}


def test_passes_are_found_in_loops_that_are_not_around_others():
    """The loop over tasks has a pass through each of its loops; it is none of them."""
    (blocks,) = assembly.sass_kernels(listing(STRIP, RANKS)).values()
    for loop in cubin_report.loops_of("low_rank_decode", 1):
        assert len(cubin_report.passes_of(loop, blocks, assembly.loops_by_header(blocks))) == 1
