"""Plants faults in copies of the Triton kernels, one at a time, and tells which of them the interpreted tests notice.

    .venv/bin/python -m tests.triton_kernels.mutate_triton              every fault; about ten minutes on two cores
    .venv/bin/python -m tests.triton_kernels.mutate_triton NAME ...     these; a name is printed with each result

Exits with 1 if a fault survives. The checkout is not touched: package and tests are copies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import mutation
from tests.mutation import Fault

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "resmoe_kernels"
TESTS = [f"tests/triton_kernels/test_triton_{name}.py" for name in ("routing", "shapes", "calls")]
TESTS += ["tests/kernels/test_experts.py"]


def _faults(file: str, **faults: tuple[str, str]) -> list[Fault]:
    return [Fault(name.replace("_", "-"), f"triton_kernels/{file}.py", *texts) for name, texts in faults.items()]


FAULTS = [
    *_faults(
        "tiles",
        activation=("y = z / (1 + tl.exp(-z))", "y = 1 / (1 + tl.exp(-z))"),
        popcount_mask=("(bits & 0x33333333)", "(bits & 0x33333331)"),
        bit_counts_itself=("((one << column) - 1)", "(one << column)"),
        bitmap_does_not_move_on=("first += tl.sum(count, 1)", "first += 0"),
        words_beyond_the_row=("row_ok[:, None] & (word < words)[None, :]", "row_ok[:, None]"),
        kept_off_by_one=("start = place * KEPT", "start = place * (KEPT - 1)"),
    ),
    *_faults(
        "decode",
        # which slots and experts
        ids_not_clamped=("(expert >= 0) & (expert < E), expert, -1", "expert >= 0, expert, -1"),
        ids_wrap=("(slot < TOP_K), other=-1)", "(slot < TOP_K), other=-1).to(tl.int32)"),
        hit_expert_dropped=("e, mask=hit)", "e, mask=hit & (e > 0))"),
        pair_done_twice=(", T * TOP_K), 1), 0) == pair", ", T * TOP_K), 1), 0) <= pair"),
        expert_twice_once=("h * tl.sum(tl.where(chosen", "h * tl.max(tl.where(chosen"),
        # base
        base_of_next_group=("mask=expert >= 0, other=-1) == g", "mask=expert >= 0, other=-1) == g + 1"),
        group_of_group=("own = tl.load(group_ptr + e)", "own = tl.load(group_ptr + g)"),
        base_for_those_without=("takes[None, :] & (own >= 0)", "takes[None, :]"),
        sum_of_those_without=("if own >= 0:\n                total += h", "total += h"),
        sum_restarted=("+ k[:, None]\n    for first", "+ k[:, None]\n    acc *= 0\n    for first"),
        column_mask_dropped=("takes[None, :] & k_ok[:, None]", "takes[None, :]"),
        columns_not_advanced=("        x += DEPTH\n", "        x += 0\n"),
        # low rank
        ranks_after_the_first_block=("range(block * ROWS, ranks, step * ROWS)", "range(block * ROWS, ranks, 2**20)"),
        row_in_32_bits=("row = start.to(tl.int64) + r", "row = start + r"),
        rows_of_the_next_expert=("row, r < ranks, K, x_ptr", "row, r < padded(ranks), K, x_ptr"),
        wrong_stride=("* places + (place_of(start, e) + first", "* T + (place_of(start, e) + first"),
        up_ranks_of_gate=("tl.load(u + I, mask=u_ok", "tl.load(u, mask=u_ok"),
        others_not_zero=("c_ptr, places, t < T,", "c_ptr, places, any_slot(expert == e),"),
        rank_block_ends_late=("tl.minimum(start + (b + 1) * RANK_BLOCK, end)", "start + (b + 1) * RANK_BLOCK"),
        place_of_wrong_expert=("(at + 2, place_of(start, e)", "(at + 2, place_of(start, e - 1)"),
        # sparse
        up_sparse_of_gate=("row_offsets_ptr, row + I, n_ok, H", "row_offsets_ptr, row, n_ok, H"),
        sparse_onto_base=("(BASE_PARTS + split)", "(split)"),
        # bias and router weight
        gate_bias_missing=("gate += tl.load(bias_ptr", "gate += 0 * tl.load(bias_ptr"),
        up_bias_of_gate=("tl.load(bias_ptr + e * N + I + n", "tl.load(bias_ptr + e * N + n"),
        router_weight_missing=("h * tl.sum(tl.where(chosen, weight, 0.0), 1)[None, :]", "h"),
        bias_without_weight=("tl.where(expert == e, weight, 0.0)", "tl.where(expert == e, 1.0, 0.0)"),
        bias_of_every_split=("if split == 0:", "if split >= 0:"),
        # splits and order
        counters_not_reset=("clear(counters_ptr, num_counters)", "clear(counters_ptr, 1)"),
        no_barrier=("tl.debug_barrier()  #", "pass  #"),
        relaxed=('sem="acq_rel"', 'sem="relaxed"'),
        wait_missing=("        gdc_wait()\n    total =", "    total ="),
        part_dropped=("SPLITS):\n                    total", "SPLITS - 1):\n                    total"),
        own_part_twice=("total = tl.zeros((ROWS, BLOCK_T), tl.float32)\n                for", "for"),
        last_part_dropped=("tl.static_range(PARTS)", "tl.static_range(PARTS - 1)"),
        store_beyond_h=("ok = (n < H)[:, None]", "ok = (n <= H)[:, None]"),
    ),
    *_faults(
        "routing",
        negative_ids_kept=("(expert >= 0) & (expert < E), expert, E", "expert < E, expert, E"),
        place_off_by_one=("(i[None, :] < i[:, None])", "(i[None, :] <= i[:, None])"),
        carry_dropped=("start += tl.sum(count, 0)", "start += 0"),
        last_chunks_only=("total += tl.sum(", "total = tl.sum("),
        offsets_one_short=("mask=bins <= E)", "mask=bins < E)"),
        tile_off_by_one=("(last <= tile)", "(last < tile)"),
        row_blocks_mixed=("within // together", "within // TILES_TOGETHER"),
    ),
    *_faults(
        "prefill",
        row_mask_dropped=("w_ok[:, None] & (k < K)[None, :]", "(k < K)[None, :]"),
        base_for_no_group=("base_ok = n_ok & (group >= 0)", "base_ok = n_ok"),
        width_exceeded=("- first_rank, width)", "- first_rank, width + 16)"),
        later_blocks_dropped=("range(block * ROWS, rank, blocks * ROWS)", "range(block * ROWS, rank, 2**20)"),
        v_rows_in_32_bits=("v_ptr + (first_rank + r).to(tl.int64) * K", "v_ptr + (first_rank + r) * K"),
        wide_ranks_dropped=("r < rank, H, OPERAND, BLOCK_M)", "r < 0, H, OPERAND, BLOCK_M)"),
        padding_not_stored=("(r < tl.cdiv(rank, 16) * 16)[None, :]", "(r < rank)[None, :]"),
        weight_of_token=("h *= tl.load(weights_ptr + pair,", "h *= tl.load(weights_ptr + pair // SLOTS,"),
        weight_missing_on_bias=("weight[:, None] * bias[None, :]", "bias[None, :]"),
        skipped_slots_summed=("mask=taken[:, None] & ok", "mask=ok"),
        sum_of_groupless=("mask=taken, other=-1) >= 0", "mask=taken, other=-1) >= -1"),
        slot_of_next_token=("pair = t * SLOTS + slot", "pair = t * SLOTS + slot + 1"),
    ),
]


def planted(fault: Fault) -> str:
    return mutation.planted(fault, PACKAGE, "tests/triton_kernels/mutate_triton.py")


def first_failure(folder: Path, tests: list[str]) -> str | None:
    """Runs the tests on the package in a folder; the line about the first that failed, None if all pass."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    where = "import resmoe_kernels; print(resmoe_kernels.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], cwd=folder, env=env, text=True).strip()
    if not Path(found).is_relative_to(folder):
        raise SystemExit(f"Python finds {found}, not the copy in {folder}")
    command = [sys.executable, "-m", "pytest", "-c", str(REPO / "pyproject.toml"), "-x", "-q", "--tb=no"]
    command += ["-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED ")]
    if run.returncode != 1 or not failed:  # not a test that failed, but pytest that could not run
        raise SystemExit(run.stdout + run.stderr)
    return failed[0].removeprefix("FAILED ").split("::", 1)[1]


def survivors(faults: list[Fault], tests: list[str]) -> list[str]:
    """Names of the faults that none of the tests notices; prints each result."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        copy = folder / "resmoe_kernels"
        # The tests too: pytest puts the folder that holds them first, and the package beside it must be the copy.
        shutil.copytree(REPO / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "cpp"))
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        return mutation.survivors(faults, planted, PACKAGE, copy, lambda fault: first_failure(folder, tests))


def main(names: list[str]) -> None:
    mutation.run(names, FAULTS, lambda chosen: survivors(chosen, TESTS))


if __name__ == "__main__":
    main(sys.argv[1:])
