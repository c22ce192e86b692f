"""The compile report: machine code is read right, limits can be broken, a file that is out of date is noticed."""

from __future__ import annotations

import importlib.util
import linecache
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install resmoe_kernels[gpu]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks.gpu import compile_report, configurations, occupancy
from resmoe_kernels.heuristics import Tile
from resmoe_kernels.triton_kernels.launch import Launch
from resmoe_kernels.triton_kernels.tiles import popcount
from tests.conftest import REPO


@pytest.fixture(autouse=True)
def cache(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compile_report.CACHE))


COMMITTED = REPO / "benchmarks" / "results" / "compile.csv"


# ---- kernels that are good, and bad in one way each


@triton.jit
def scaled(x):
    return x * 2.0


@triton.jit
def product(
    x_ptr, w_ptr, y_ptr, bias_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, POPCOUNT: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DEPTH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, DEPTH):
        x = tl.load(x_ptr + m[:, None] * K + (first + k)[None, :], mask=(m < M)[:, None], other=0.0)
        w = tl.load(w_ptr + n[None, :] * K + (first + k)[:, None], mask=(n < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n)[None, :]
    y = y_ptr + m[:, None] * N + n[None, :]
    if POPCOUNT:
        tl.store(y.to(tl.pointer_type(tl.int32)), popcount(acc.to(tl.uint32, bitcast=True)))
    else:
        tl.store(y, scaled(acc), mask=(m < M)[:, None] & (n < N)[None, :])


def product_launch(
    *, rows=64, depth=64, warps=4, stages=3, dtype=torch.bfloat16, M=64, K=2048, bias=None, x_offset=0, kernel=product,
    **constants,
) -> Launch:  # fmt: skip
    x = torch.empty(M * K + 64, dtype=dtype, device="meta")[x_offset:]
    w, y = torch.empty(256, K, dtype=dtype, device="meta"), torch.empty(M, 256, device="meta")
    constants = {"BLOCK_M": rows, "BLOCK_N": 64, "DEPTH": depth, "POPCOUNT": False, **constants}
    return Launch(kernel, (4,), (x, w, y, bias, M, 256, K), constants, Tile(rows, 64, depth, 1, warps, stages), False)


def row_of(launch: Launch, target: str) -> dict[str, str]:
    key = (target, launch.name, str(launch.tile.warps), str(launch.tile.stages), "", "")
    return compile_report.facts(configurations.Configuration(key, "", launch, ["a test"]))


def test_facts_of_a_good_kernel_on_every_target(tmp_path):
    expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32_32x32x8_bf16"}
    for target, opcode in expected.items():
        row = row_of(product_launch(), target)
        assert compile_report.violations(row) == []
        assert set(row) == set(compile_report.COLUMNS)
        assert (row["dots"], row["loops"], row["spills"], row["popcounts"]) == ("1", "1", "0", "0")
        assert row["main_products"].startswith(opcode) and row["products"].startswith(opcode)
        # Each of 128 (256) threads loads its part of two tiles of 64 x 64 numbers of two bytes, 16 bytes at a time.
        threads = 256 if target == "gfx942" else 128
        assert int(row["main_bytes"]) == 2 * 64 * 64 * 2 // threads
        assert row["main_async_bytes"] == ("0" if target == "gfx942" else row["main_bytes"])
        assert row["async_loops"] == ("0" if target == "gfx942" else "1")
        assert int(row["tensor_columns"]) == (64 if target == "sm_100" else 0)
        assert 0 < int(row["registers"]) < 256
        if target == "sm_90":  # three stages of two tiles, and nothing that the hardware keeps for itself
            assert row["shared"] == str(3 * 2 * 64 * 64 * 2)


BROKEN = [
    ("spills", "sm_80", {"rows": 128, "warps": 1}, r"\d+ instructions in loops spill registers"),
    ("spills on AMD", "gfx942", {"rows": 256, "warps": 1}, r"\d+ instructions in loops spill registers"),
    (
        "too much shared memory",
        "sm_80",
        {"depth": 256, "stages": 4},
        r"bytes of shared memory; a block has at most 166912",
    ),
    ("too much shared memory on AMD", "gfx942", {"depth": 512, "warps": 8}, r"a block has at most 65536"),
    (
        "nothing in flight",
        "sm_90",
        {"stages": 1},
        r"0 of 128 bytes of its main loop are loaded asynchronously; all must be, but",
    ),
]


@pytest.mark.parametrize("target, change, sentence", [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_kernel_that_breaks_a_limit(target, change, sentence):
    found = compile_report.violations(row_of(product_launch(**change), target))
    assert any(re.search(sentence, f) for f in found), found
    assert all(f.startswith(f"{target} product [") and "of a test: " in f for f in found)


GOOD = {
    "target": "sm_90", "kernel": "k", "constants": "A=1", "warps": "4", "stages": "2", "launched_by": "x",
    "spills": "16", "loop_spills": "0", "registers": "255", "shared": str(227 << 10), "blocks": "1",
    "limited_by": "shared memory", "dots": "2", "products": "HMMA:2", "loops": "2", "async_loops": "2",
    "main_bytes": "64", "main_async_bytes": "64", "main_popcounts": "0",
}  # fmt: skip
BAD = [
    ({"spills": "17"}, "17 instructions spill registers; at most 16 may, outside of loops"),
    ({"loop_spills": "1"}, "1 instructions in loops spill registers; none may"),
    ({"registers": "256"}, "256 registers per thread; at most 255 are there"),
    ({"shared": str(1 + (227 << 10))}, "232449 bytes of shared memory; a block has at most 232448"),
    ({"blocks": "0", "limited_by": "tensor memory"}, "no block fits a multiprocessor, for tensor memory"),
    ({"products": ""}, "its 16-bit products do not run on tensor cores"),
    ({"async_loops": "1"}, "of its 2 loops of products 1 load asynchronously; all must"),
    ({"main_async_bytes": "48"}, "48 of 64 bytes of its main loop are loaded asynchronously; all must be, but for those"
     " of a sparse tile"),
    ({"main_async_bytes": "0", "main_popcounts": "8"}, "0 of 64 bytes of its main loop are loaded asynchronously; all "
     "must be, but for those of a sparse tile"),
]  # fmt: skip
NOT_BAD = [
    {"main_async_bytes": "48", "main_popcounts": "8"},
    {"kernel": "prefill_down", "async_loops": "1"},
    {"target": "gfx942", "shared": "65536", "registers": "512", "async_loops": "0", "main_async_bytes": "0"},
    {"dots": "0", "products": "", "loops": "0", "async_loops": "0", "main_bytes": "0", "main_async_bytes": "0"},
]


@pytest.mark.parametrize("change, sentence", BAD)
def test_every_limit_has_a_sentence(change, sentence):
    assert compile_report.violations(GOOD | change) == [f"sm_90 k [A=1; 4 warps, 2 stages] of x: {sentence}"]


@pytest.mark.parametrize("change", [{}, *NOT_BAD])
def test_what_is_within_limits(change):
    assert compile_report.violations(GOOD | change) == []


def test_float32_products_are_no_tensor_core_products():
    row = row_of(product_launch(dtype=torch.float32, rows=16, depth=32), "sm_90")
    assert (row["dots"], row["products"]) == ("0", "")
    assert row["main_products"].startswith("FFMA")
    assert compile_report.violations(row) == []


@pytest.mark.parametrize("target", configurations.TARGETS)
def test_llvm_makes_one_instruction_of_popcount(target):
    row = row_of(product_launch(POPCOUNT=True), target)
    lanes = 4 * (64 if target == "gfx942" else 32)
    assert int(row["popcounts"]) == 64 * 64 // lanes


@pytest.mark.parametrize("rows, warps", [(16, 4), (64, 4), (256, 4), (128, 1)])
def test_occupancy_is_what_llvm_says_for_amd(rows, warps):
    """LLVM states warps per scheduler, for the registers alone: shared memory is allocated at the launch."""
    with configurations.pretending("gfx942"):
        text = configurations.warmup(product_launch(rows=rows, warps=warps)).asm["amdgcn"]
    stated = int(text.split("; Occupancy: ")[1].split()[0])
    registers = int(text.split("; TotalNumVgprs: ")[1].split()[0])
    ours = occupancy.occupancy("gfx942", 1, registers, 0)
    assert min(ours.limits["registers"], ours.limits["threads"]) // occupancy.SCHEDULERS == stated


# ---- which configurations there are


def described(monkeypatch, *launched: Launch, target: str = "sm_90") -> list[configurations.Configuration]:
    monkeypatch.setattr(configurations, "launches", lambda case, target: [launched[case]])
    return configurations.configurations(target, range(len(launched)))


def test_launches_that_run_the_same_code_are_one_configuration(monkeypatch):
    shared = described(monkeypatch, product_launch(M=17), product_launch(M=18), product_launch(M=19))
    assert [c.launched_by for c in shared] == [["0", "1", "2"]]
    for other in (
        {"M": 32},
        {"M": 1},
        {"x_offset": 1},
        {"dtype": torch.float16},
        {"warps": 8},
        {"stages": 2},
        {"depth": 32},
    ):
        assert len(described(monkeypatch, product_launch(M=17), product_launch(**{"M": 17, **other}))) == 2, other


def test_how_a_configuration_is_described(monkeypatch):
    bias = torch.empty(256, device="meta")
    for launch, arguments in (
        (product_launch(M=17), "*bf16 *bf16 *fp32 - i32 i32%16 i32%16"),
        (product_launch(M=1, bias=bias), "*bf16 *bf16 *fp32 *fp32 1 i32%16 i32%16"),
        (product_launch(M=32, x_offset=1), "*bf16!16 *bf16 *fp32 - i32%16 i32%16 i32%16"),
    ):
        (found,) = described(monkeypatch, launch)
        assert found.key == ("sm_90", "product", "4", "3", "BLOCK_M=64 BLOCK_N=64 DEPTH=64 POPCOUNT=False", arguments)
    (found,) = described(monkeypatch, product_launch(M=1 << 15, K=1 << 15), target="gfx942")
    assert found.key[-1] == "*bf16>2G *bf16 *fp32 - i32%16 i32%16 i32%16"


def test_describing_compiles_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (found,) = described(monkeypatch, product_launch(rows=16, depth=16))
    assert list(tmp_path.iterdir()) == []
    compile_report.facts(found)
    assert list(tmp_path.iterdir()) != []


def test_real_launches_come_from_the_op():
    """One of every kernel, at every target; and what a case asks for is what arrives."""
    few = [case for case in configurations.cases() if case.shape.name == "olmoe" and case.tokens in (8, 512)]
    for target in ("sm_90", "gfx942"):
        found = configurations.configurations(target, few)
        kernels = Counter(c.key[1] for c in found)
        assert {"decode_x", "decode_gate_up", "decode_h", "decode_down"} <= set(kernels)
        assert {"prefill_shrink", "prefill_gate_up", "prefill_down", "prefill_sum"} <= set(kernels)
        constants = [c.key[4] for c in found if c.key[1] == "decode_gate_up"]
        for part in ("KEPT=8", "KEPT=0", "OPERAND=fp16", "OPERAND=fp32"):
            assert any(part in c for c in constants), part
        # PDL is a launch option, no argument: it must be compiled in where the op would ask for it.
        assert all(("OVERLAPS=True" in c) == (target == "sm_90") for c in constants)


def test_every_model_form_and_number_of_tokens_is_a_case():
    cases = configurations.cases()
    usual = {(c.shape.name, c.parts, c.tokens) for c in cases if c.dtype == torch.bfloat16 and c.groups == 1}
    for model in ("mixtral", "dsv2lite", "qwen3", "olmoe"):
        for form in ("lowrank", "block", "bitmap"):
            assert {(model, (form,), tokens) for tokens in (1, 8, 64, 512, 4096)} <= usual
    assert {c.dtype for c in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert any(not c.shape.gated for c in cases)
    assert any(c.groups > 1 and {"lowrank", "block", "bias"} <= set(c.parts) for c in cases)


def test_source_hash(tmp_path, monkeypatch):
    """Of code, the code it calls included, and not of comments or lines."""

    def hash_of(text: str) -> str:
        (tmp_path / "kernels.py").write_text("import triton\nimport triton.language as tl\n" + text)
        specification = importlib.util.spec_from_file_location("kernels", tmp_path / "kernels.py")
        module = importlib.util.module_from_spec(specification)
        linecache.checkcache()
        specification.loader.exec_module(module)
        return configurations.source_hash(module.kernel)

    plain = """
@triton.jit
def one(x):
    "One more."
    return x + 1
@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, one(tl.load(x_ptr)))
"""
    first = hash_of(plain)
    assert hash_of("\n\n# moved\n" + plain.replace("x + 1", "x + 1  # one").replace("One", "Another")) == first
    assert hash_of(plain.replace("x + 1", "x + 2")) != first
    assert hash_of(plain.replace("tl.load(x_ptr)", "tl.load(x_ptr + 1)")) != first


# ---- comparison with a file


@pytest.fixture
def report(monkeypatch) -> SimpleNamespace:
    """Two configurations, one compiled now, and the file that matches."""
    found = described(monkeypatch, product_launch(), product_launch(depth=32))
    rows = [compile_report.facts(c) for c in found]
    return SimpleNamespace(found=found, rows=rows[:1], kept=[dict(row) for row in rows])


def compared(report) -> list[str]:
    return compile_report.compared(report.found, report.rows, report.kept, "FILE")


def test_a_file_that_matches(report):
    assert compared(report) == []


def test_counts_that_changed(report):
    report.kept[0]["registers"] = "1"
    (sentence,) = compared(report)
    assert f"registers '1' is now '{report.rows[0]['registers']}'" in sentence
    assert sentence.endswith("; run python -m benchmarks.gpu.compile_report --csv FILE")


def test_source_that_changed_without_being_compiled_again(report):
    report.kept[1]["source"] = "before"
    (sentence,) = compared(report)
    assert f"source 'before' is now '{report.found[1].source}'" in sentence


def test_configurations_that_came_and_went(report):
    gone = dict(report.kept[0], constants="BLOCK_M=1")
    report.kept = [gone, report.kept[1]]
    came, went = compared(report)
    assert came.startswith("sm_90 product [BLOCK_M=64") and "is launched and not in FILE" in came
    assert went.startswith("sm_90 product [BLOCK_M=1;") and "is in FILE and no longer launched" in went


def test_limits_of_rows_that_are_not_compiled_again(report):
    report.kept[1]["loop_spills"] = "3"
    (sentence,) = compared(report)
    assert "3 instructions in loops spill registers" in sentence


def test_another_version_of_triton_checks_limits_only(report, capsys):
    for row in report.kept:
        row |= {"triton": "3.6.0", "registers": "1"}
    assert compared(report) == []
    assert capsys.readouterr().out == f"FILE was made with Triton 3.6.0, this is {triton.__version__}: limits only\n"
    report.rows[0]["loop_spills"] = "3"
    (sentence,) = compared(report)
    assert "3 instructions in loops spill registers" in sentence


def test_the_subset_has_every_kernel_and_target():
    key = [(t, k, "4", "3", str(i), "") for t in ("a", "b") for k, n in (("x", 1), ("y", 10)) for i in range(n)]
    found = [configurations.Configuration(k, "", None, []) for k in key]
    chosen = Counter((c.target, c.key[1]) for c in compile_report.subset(found))
    assert chosen == {("a", "x"): 1, ("a", "y"): 2, ("b", "x"): 1, ("b", "y"): 2}


def test_the_script_writes_a_file_and_finds_what_was_changed_in_it(tmp_path):
    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "benchmarks.gpu.compile_report", *map(str, arguments)]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)

    only = ("--target", "sm_80", "--kernel", "route_count")
    file = tmp_path / "new" / "c.csv"
    written = run(*only, "--csv", file)
    assert written.returncode == 0, written.stdout + written.stderr
    rows = compile_report.read_rows(file)
    assert rows and {row["kernel"] for row in rows} == {"route_count"}
    assert f"| `route_count` | {len(rows)} |" in file.with_suffix(".md").read_text()
    file.write_text(file.read_text().replace(rows[0]["source"], "0" * 12))
    checked = run(*only, "--check", file)
    complaints = [line for line in checked.stdout.splitlines() if line.startswith("sm_80 route_count")]
    assert checked.returncode == 1 and len(complaints) == len(rows), checked.stdout + checked.stderr
    assert all(f": source '000000000000' is now '{rows[0]['source']}'; run " in line for line in complaints)


def test_a_kernel_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_report.py", "--target", "sm_80", "--kernel", "gemm", "--csv", "c.csv"])
    with pytest.raises(SystemExit):
        compile_report.main()
    assert "--kernel: the op starts no kernel named gemm" in capsys.readouterr().err


def test_the_committed_file_has_every_target_and_kernel_within_limits():
    rows = compile_report.read_rows(COMMITTED)
    assert {row["target"] for row in rows} == set(configurations.TARGETS)
    assert [sentence for row in rows for sentence in compile_report.violations(row)] == []
    assert COMMITTED.with_suffix(".md").read_text() == compile_report.summary(rows)


def test_llvm_finds_every_popcount_of_the_committed_kernels():
    """What is around it decides whether the sequence is recognised: one instruction at least for each number that a
    thread expands."""
    sparse = [row for row in compile_report.read_rows(COMMITTED) if "KEPT=" in row["constants"]]
    sparse = [row for row in sparse if any(form in row["launched_by"] for form in ("block", "bitmap"))]
    assert {row["target"] for row in sparse} == set(configurations.TARGETS)
    for row in sparse:
        constants = dict(constant.split("=") for constant in row["constants"].split())
        threads = int(row["warps"]) * occupancy.UNITS[row["target"]].lanes
        halves = 2 if constants.get("GATED") == "True" else 1
        expanded = halves * int(constants["ROWS"]) * int(constants["DEPTH"]) // threads
        assert int(row["popcounts"]) >= expanded, compile_report.name_of(row)
