"""Plants faults in copies of the CUDA kernels, one at a time, and tells which of them the emulated tests notice.

    .venv/bin/python -m tests.cuda.mutate_cuda              every fault; about ten minutes on two cores
    .venv/bin/python -m tests.cuda.mutate_cuda NAME ...     these; a name is printed with each result

A fault that a test does not notice meets it again with ThreadSanitizer, then with AddressSanitizer. Exits with 1 if
one survives. The checkout is not touched.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests import mutation
from tests.cuda.emulated_cuda import header_folders
from tests.mutation import Fault

REPO = Path(__file__).resolve().parents[2]
KERNELS = REPO / "csrc" / "cuda"
TESTS = ("low_rank_decode", "block_sparse_decode")
EMULATION = ("cuda_emulation", "cuda_emulation_threads")
SANITIZERS = ("", "thread", "address")
LONGEST = 600  # seconds of a test, with a sanitizer too; one that takes longer waits for ever


def _faults(file: str, **faults: tuple[str, str]) -> list[Fault]:
    return [Fault(name.replace("_", "-"), f"{file}.cuh", *texts) for name, texts in faults.items()]


FAULTS = [
    *_faults(
        "routing",
        ids_wrap=("const int64_t id = ", "const int32_t id = (int32_t)"),
        negative_ids_kept=("id >= 0 && id < call.experts", "id < call.experts"),
        seen_before_it_is_cleared=("scratch.seen[e] = 0;\n  __syncthreads();", "scratch.seen[e] = 0;"),
        group_not_read=("call.group != nullptr && call.group[e] >= 0", "call.group != nullptr"),
        hits_of_the_last_lanes=("hits += __popc(vote);", "hits = __popc(vote);"),
        scan_one_lane_short=("if (lane >= step)", "if (lane > step)"),
        scan_without_carry=("total += __shfl_sync(~0u, sum, 31)", "total = __shfl_sync(~0u, sum, 31)"),
        entry_of_the_first_token=(" + __popc(tokens[i] & ((1u << t) - 1))", ""),
        second_slot_again=("if (scratch.index[earlier] == e) return;", ""),
        weight_of_one_slot=("other < (t + 1) * call.top_k", "other <= pair"),
        slot_of_next_token=("routing.pairs[at] = static_cast<uint8_t>(pair)", "routing.pairs[at] = pair + 1"),
    ),
    *_faults(
        "decode_block",
        activation=("return z / (1.0f + expf(-z));", "return 1.0f / (1.0f + expf(-z));"),
        tokens_exchanged=("second_token[2] = {token.z, token.w}", "second_token[2] = {token.w, token.z}"),
        published_before_the_barrier=("  __syncthreads();\n  if (threadIdx.x == 0)", "  if (threadIdx.x == 0)"),
        flag_read_without_acquire=("ptx::acquire(flag) <", "*static_cast<const volatile uint32_t*>(flag) <"),
        flag_not_passed_on=("ptx::pause();\n  }\n  __syncwarp();", "ptx::pause();\n  }"),
        waits_for_one_less=("< count) ptx::pause()", "+ 1 < count) ptx::pause()"),
    ),
    *_faults(
        "low_rank_tasks",
        plan_read_early=("    }\n  }\n  __syncthreads();", "    }\n  }"),
        start_of_next_expert=(": offsets[e];", ": offsets[e + 1];"),
        last_strip_dropped=("(plan.rank[m][i] + 15) / 16", "plan.rank[m][i] / 16"),
        strip_of_wrong_expert=("[middle] <= number", "[middle] < number"),
        rank_of_the_other_matrix=("plan.strips_before[m][low]) * 16", "plan.strips_before[0][low]) * 16"),
        last_ranks_dropped=("(plan.rank[m][at.i] + 31) / 32", "plan.rank[m][at.i] / 32"),
        blocks_dealt_anew=(": at.block - blocks;", ": 0;"),
        experts_of_other_warps=("warp * plan.at_once / kWarps", "warp"),
    ),
    *_faults(
        "low_rank_chunks",
        quarters_in_one_bank=("kQuarterBytes = 512 + 16", "kQuarterBytes = 512"),
        rows_in_one_bank=("lane % 8 ^ (lane / 8 & 1) << 2", "lane % 8"),
        halves_not_exchanged_back=("(half ^ (g & 1)) * 64", "half * 64"),
        lower_rows_twice=("piece + 2 * kQuarterBytes", "piece + kQuarterBytes"),
        first_product_twice=("product * 256", "product * 128"),
    ),
    *_faults(
        "low_rank_ring",
        copies_not_waited_for=("ptx::wait_copies<Stages - 2>();", ""),
        one_group_too_few=("ptx::wait_copies<Stages - 2>", "ptx::wait_copies<Stages - 1>"),
        lanes_do_not_meet=("    __syncwarp();  // the copies", "    // the copies"),
        groups_do_not_count_chunks=("ptx::commit_copies();  //", "if (left_ > 0) ptx::commit_copies();  //"),
        ring_one_short=("== Stages * kChunkBytes", "== (Stages - 1) * kChunkBytes"),
        chunk_of_next_task=("loads_ == 0 ? first : task_behind()", "task_behind()"),
        rows_of_next_expert=("(rows - own_row + 3) / 4 : 0", "4 : 0"),
        columns_of_next_row=("if (left_ <= edge_) copies_ = 0;", ""),
        ranks_of_next_expert=("copies_ -= fewer_;", ""),
        up_columns_of_gate=("(is_second ? s_.I : 0)", "0"),
        blocks_one_apart=("less_ = 32 * blocks;", "less_ = 32;"),
        first_chunk_again=("from_ += step_;", ""),
    ),
    *_faults(
        "low_rank_decode",
        v_not_waited_for=("    wait_for(flag_c(), static_cast<uint32_t>(plan_.tasks[v_gate_up]));\n", ""),
        half_of_a=("call_.gated ? 2 : 1);", "1);"),
        wh_not_waited_for=("if (is_down) wait_for(", "if (is_down && is_v) wait_for("),
        flags_overlap=("flag_c() + 3 + s_.I / 16 + tile", "flag_c() + 3 + tile"),
        flags_not_cleared=("(3 + I / 16 + H / 32)", "(I / 16 + H / 32)"),
        flag_of_next_tile=("flag_a(task.number % (s_.I / 16))", "flag_a((task.number + 1) % (s_.I / 16))"),
        c_of_those_not_routed=("t >= s_.T || (is_v && !routing().takes(strip.i, t))", "t >= s_.T"),
        h_of_the_first_slot=("routing().pair(strip.i, t) : t", "t * s_.top_k : t"),
        ranks_not_written=("const bool there = r < padded(plan_.rank[m][at.i]);", "const bool there = true;"),
        base_for_those_without=("routing().has_base[i] != 0 ? 1.0f : 0.0f", "1.0f"),
        router_weight_missing=("        h *= routing().weights[entry];\n", ""),
        part_of_a_warp_dropped=("warp < kWarps; ++warp) sum +=", "warp < kWarps - 1; ++warp) sum +="),
        way_dropped=("other < ways; ++other", "other < ways - 1; ++other"),
        parts_written_again=("    if (ways > 1) __syncthreads();", "    //"),
        y0_missing=("if (has_base) sum += ptx::load_l2(", "if (false) sum += ptx::load_l2("),
    ),
    *_faults(
        "block_sparse_decode",
        bit_left_standing=("ptx::rotate_left(0xFFFFFFFE, place)", "ptx::rotate_left(0xFFFFFFFF, place)"),
        one_slot_too_few=("ptx::wait_copies<kStages - 2>", "ptx::wait_copies<kStages - 1>"),
        values_of_the_first=("reinterpret_cast<const uint4*>(shared)[j]", "reinterpret_cast<const uint4*>(shared)[0]"),
        z_over_the_routing=("  Routing routing;\n  union {", "  union {\n    Routing routing;"),
        row_of_first_expert=("static_cast<int64_t>(routing().expert[i]) *", "static_cast<int64_t>(0) *"),
    ),
    *_faults(
        "block_sparse_scatter",
        zeros_not_restored=("*reinterpret_cast<uint16_t*>(own + at[k]) = 0;", "(void)at;"),
        odd_column_in_even=("c * 64 - (c & 1) * 62", "c * 64"),
        up_rows_of_gate=("second_ = load_down_ || !call_.gated ? 8 : s_.I;", "second_ = 8;"),
        values_of_one_piece=("piece % (n / 2) * 16", "0"),
        flag_not_waited_for=("if (down && !waited) wait_for", "if (false) wait_for"),
        ways_one_short=("first_expert_ * ways_, ways_)", "first_expert_ * ways_, ways_ - 1)"),
        parts_read_early=(
            "part(warp_, tile, j) = sums.of[tile][j];\n    }\n    __syncthreads();",
            "part(warp_, tile, j) = sums.of[tile][j];\n    }",
        ),
        zeros_cleared_early=("t, sum);\n    }\n    __syncthreads();", "t, sum);\n    }"),
    ),
    *_faults(
        "block_sparse_walk",
        up_rows_are_the_gate_s=("(two ? (expert_unit & 1) * s_.I : 0)", "0"),
        wh_staged_early=("    wait_for(flag(), static_cast<uint32_t>(gate_up_tasks_));\n", ""),
        wh_not_arrived=("    ptx::wait_copies<0>();\n    __syncthreads();", "    __syncthreads();"),
        wh_of_other_threads=("    ptx::wait_copies<0>();\n    __syncthreads();", "    ptx::wait_copies<0>();"),
        one_row_a_step=("for (; b >= 2 * W; b -= 2 * W) ++row;", "if (b >= 2 * W) b -= 2 * W, ++row;"),
        token_of_others=("(tokens & 1) != 0 ? 0 : 1,", "0,"),
        sum_of_those_without=("routing().takes(i, t) && routing().has_base[i] != 0;", "routing().takes(i, t);"),
        parts_read_before_they_are=("[t] = sum;\n    }\n    __syncthreads();", "[t] = sum;\n    }"),
    ),
]


def planted(fault: Fault) -> str:
    return mutation.planted(fault, KERNELS, "tests/cuda/mutate_cuda.py")


def tests_of(fault: Fault) -> list[str]:
    """The tests of kernels that a file is part of."""
    own = [test for test in TESTS if fault.file.startswith(test.removesuffix("decode"))]
    return own or list(TESTS)


def compiler(folder: Path, sanitizer: str) -> list[str]:
    command = ["g++", "-std=c++20", "-O1", "-g1", f"-I{folder}", f"-I{REPO / 'tests' / 'cpp'}"]
    # The second has what triton's headers, where they are the only ones, lack.
    command += ["-isystem", str(header_folders()[0]), "-isystem", str(REPO / "tests" / "cpp" / "host_headers")]
    command += ["-DRESMOE_EMULATE_CUDA", "-Wno-unknown-pragmas"]
    return [*command, f"-fsanitize={sanitizer}"] if sanitizer else command


@cache
def emulation(folder: Path, sanitizer: str) -> tuple[str, ...]:
    """Its objects. Not for ThreadSanitizer: it changes stacks."""
    objects = {name: str(folder / f"{name}-{sanitizer}.o") for name in EMULATION}
    for name, file in objects.items():
        command = compiler(folder, "" if sanitizer == "thread" else sanitizer)
        subprocess.run([*command, "-c", REPO / "tests" / "cpp" / f"{name}.cpp", "-o", file], check=True)
    return tuple(objects.values())


def failure_of(folder: Path, test: str, sanitizer: str) -> str | None:
    """Compiles and runs a test on the kernels in a folder; what it says where it fails, None if it passes."""
    program = folder / f"test-{test}"
    source = REPO / "tests" / "cpp" / f"test_{test}.cpp"
    subprocess.run([*compiler(folder, sanitizer), source, *emulation(folder, sanitizer), "-o", program], check=True)
    try:
        run = subprocess.run([program], capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return f"{test}: it does not end"
    if run.returncode == 0:
        return None
    said = re.search(r"test_\w+\.cpp:\d+: (.*)|what\(\):\s*(.*)|ERROR: (Address\w+: \S+)", run.stdout + run.stderr)
    what = next(filter(None, said.groups())) if said else f"exit {run.returncode}"
    return f"{test}{', ' * bool(sanitizer)}{sanitizer}: {what[:100]}"


def first_failure(folder: Path, fault: Fault | None) -> str | None:
    if fault is None:
        return next(filter(None, (failure_of(folder, test, "") for test in TESTS)), None)
    for sanitizer in SANITIZERS:
        for test in tests_of(fault):
            if (failure := failure_of(folder, test, sanitizer)) is not None:
                if sanitizer:
                    require_sound(test, sanitizer)
                return failure
    return None


@cache
def require_sound(test: str, sanitizer: str) -> None:
    """Ends the script where a sanitizer has something against the kernels as they are."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(KERNELS, Path(folder, "cuda"))
        if (failure := failure_of(Path(folder), test, sanitizer)) is not None:
            raise SystemExit(f"without any fault there is a failure: {failure}")


def survivors(faults: list[Fault]) -> list[str]:
    """Names of the faults that no test notices; prints each result."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        shutil.copytree(KERNELS, folder / "cuda")
        return mutation.survivors(faults, planted, KERNELS, folder / "cuda", lambda fault: first_failure(folder, fault))


def main(names: list[str]) -> None:
    mutation.run(names, FAULTS, survivors)


if __name__ == "__main__":
    main(sys.argv[1:])
