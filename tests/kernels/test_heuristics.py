"""Tile sizes: within what targets have, enough programs for every unit, tables read and written; no GPU needed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest

from resmoe_kernels import heuristics
from resmoe_kernels.heuristics import DECODE_KERNELS, GPUS, PREFILL_KERNELS, TARGETS, Problem, Tile, tile_of

# tokens is set by each test
REAL = {
    "mixtral": Problem(1, 2, 8, 4096, 14336, True, 1, 896, 784, False, 2),
    "dsv2lite": Problem(1, 6, 64, 2048, 1408, True, 1, 296, 208, False, 2),
    "qwen3": Problem(1, 8, 128, 2048, 768, True, 1, 216, 139, False, 2),
    "olmoe": Problem(1, 8, 64, 2048, 1024, True, 1, 256, 170, False, 2),
    "switch": Problem(1, 1, 32, 768, 3072, False, 1, 153, 153, False, 2),
}
SPARSE = {"rank_gate_up": 0, "rank_down": 0, "sparse": True}
ODD = [
    Problem(3, 2, 6, 45, 37, True, 2, 10, 10, True, 4),
    Problem(5, 1, 1, 1, 1, False, 0, 1, 0, False, 2),
    Problem(2, 3, 4, 33, 70, True, 4, 0, 0, False, 2),  # one base for each expert: plain dense
    Problem(7, 8, 200, 5120, 1536, True, 1, 0, 300, True, 2),
]
TOKENS = (1, 2, 3, 8, 16, 17, 33, 64, 65, 128, 500, 4096, 100_000)


def problems():
    for problem in (*REAL.values(), *(replace(p, **SPARSE) for p in REAL.values()), *ODD):
        for tokens, size in itertools.product(TOKENS, (2, 4)):
            yield replace(problem, tokens=tokens, itemsize=size)
            yield replace(problem, tokens=tokens, itemsize=size, sparse=True)


def kernels(problem: Problem, target: str) -> tuple[str, ...]:
    return DECODE_KERNELS if heuristics.decodes(problem, target) else PREFILL_KERNELS


@pytest.mark.parametrize("target", [*TARGETS, "sm_86", "sm_120", "gfx90a", "interpreter"])
def test_tiles_are_what_kernels_and_targets_can_take(target):
    shared = {"sm_86": 99, "sm_120": 99, "gfx90a": 64, "interpreter": 1 << 20}
    for name, gpu in GPUS.items():
        shared[name] = gpu.shared >> 10
    assert {name: shared[name] for name in TARGETS} == {
        "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64
    }  # fmt: skip
    for problem in problems():
        for kernel in kernels(problem, target):
            tile = tile_of(kernel, problem, target)
            where = f"{kernel} {problem} {tile}"
            for size in (tile.tokens, tile.rows, tile.depth):
                assert size >= 16 and size & (size - 1) == 0, where
            summed_over_sparse = problem.sparse and kernel in (
                "decode_gate_up", "decode_h", "prefill_gate_up", "prefill_down"
            )  # fmt: skip
            assert not summed_over_sparse or tile.depth % 32 == 0, where
            halves = 2 if problem.gated and kernel.endswith("gate_up") else 1
            loads = tile.stages * (halves * tile.rows + tile.tokens) * tile.depth * problem.itemsize
            assert loads <= shared[target] * 1024, where
            assert tile.warps in (4, 8) and 2 <= tile.stages <= 6, where
            if kernel in DECODE_KERNELS:
                assert tile.tokens == max(16, 1 << (problem.tokens - 1).bit_length()), where
            else:
                assert tile.splits == 1, where


def test_what_decode_takes():
    for target in TARGETS:
        assert heuristics.decodes(replace(REAL["qwen3"], tokens=64), target)
        assert not heuristics.decodes(replace(REAL["qwen3"], tokens=65), target)


@pytest.mark.parametrize("target", [*TARGETS, "interpreter"])
def test_numbers_of_tokens_share_tiles_and_so_compiled_kernels(target):
    for problem in problems():
        p = replace(problem, tokens=1 << (problem.tokens - 1).bit_length())
        for kernel in kernels(p, target):
            assert tile_of(kernel, problem, target) == tile_of(kernel, p, target)


@pytest.mark.parametrize("target", TARGETS)
def test_splits_are_no_more_than_there_is_to_share(target):
    for problem in problems():
        if not heuristics.decodes(problem, target):
            continue
        tokens = 1 << (problem.tokens - 1).bit_length()  # what tiles are chosen for
        can_be_hit = min(problem.num_experts, tokens * problem.top_k)
        for kernel in ("decode_gate_up", "decode_h"):
            splits = tile_of(kernel, problem, target).splits
            assert 1 <= splits <= can_be_hit
        assert tile_of("decode_x", problem, target).splits == 1
        blocks = can_be_hit * ceil(problem.rank_down / 64)
        assert 1 <= tile_of("decode_down", problem, target).splits <= max(1, blocks)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize("shape", ["dsv2lite", "qwen3", "olmoe", "mixtral"])
def test_one_token_fills_the_gpu(shape, target):
    """At T = 1 exactly top_k experts are hit: programs with work are counted here by hand."""
    p, units = REAL[shape], GPUS[target].units
    x, gate_up, h, down = (tile_of(kernel, p, target) for kernel in DECODE_KERNELS)
    assert ceil(2 * p.intermediate_size / x.rows) + p.top_k * ceil(p.rank_gate_up / x.rows) >= units
    assert ceil(p.intermediate_size / gate_up.rows) * gate_up.splits >= units
    assert ceil(p.hidden_size / h.rows) + p.top_k * ceil(p.rank_down / h.rows) >= units
    assert ceil(p.hidden_size / down.rows) * down.splits >= units


@pytest.mark.parametrize("shape", ["dsv2lite", "qwen3", "olmoe", "mixtral"])
def test_more_tokens_never_take_smaller_tiles_than_full_units_allow(shape):
    """Where experts hit keep every unit busy, tiles are larger than at one token, or as large."""
    few, many = (tile_of("decode_x", replace(REAL[shape], tokens=t), "sm_90") for t in (1, 64))
    assert many.rows >= few.rows and many.rows == 64
    assert tile_of("decode_down", replace(REAL["qwen3"], tokens=64), "sm_90").splits < 8  # partial sums cost traffic
    rows = [tile_of("prefill_shrink", replace(REAL[shape], tokens=t), "sm_90").tokens for t in (65, 512, 4096)]
    assert rows == sorted(rows) and rows[-1] == 128


def test_loads_in_flight_cover_the_latency_of_memory():
    """One program of decode_x on a unit asks for at least 1 us of an H100's bandwidth, or fills it with two."""
    for p in REAL.values():
        tile = tile_of("decode_x", p, "sm_90")
        programs = ceil((2 if p.gated else 1) * p.intermediate_size / tile.rows)
        programs += p.top_k * ceil(p.rank_gate_up / tile.rows)
        per_unit = max(1.0, programs / 132)
        assert (tile.stages - 1) * tile.rows * tile.depth * 2 * per_unit >= 3.35e12 * 1e-6 / 132


def test_the_interpreter_exercises_every_loop():
    for sparse in (False, True):
        p = Problem(3, 2, 6, 45, 37, True, 2, 10, 10, sparse, 4)
        for kernel in DECODE_KERNELS:
            tile = tile_of(kernel, p, "interpreter")
            assert tile.rows < 37 and tile.splits == 2
            assert tile.depth < (
                33 if kernel in ("decode_gate_up", "decode_down") else 37
            )  # 33: the largest rank there
        for kernel in ("prefill_shrink", "prefill_gate_up", "prefill_down"):
            tile = tile_of(kernel, replace(p, tokens=70), "interpreter")
            assert tile.tokens <= 32 and tile.rows < 37 and tile.depth < 37


# ---- tables


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(heuristics, "TUNED", tmp_path)
    heuristics.forget()
    yield tmp_path
    heuristics.forget()


MEASURED = Tile(16, 32, 128, splits=3, warps=8, stages=4)


def test_a_table_comes_before_the_defaults(tuned):
    p = replace(REAL["qwen3"], tokens=8)
    default = tile_of("decode_down", p, "sm_90")
    assert default != MEASURED
    heuristics.write_table(tuned / "sm_90.json", [("decode_down", p, MEASURED)], device="a GPU", triton="3.8.0")
    assert tile_of("decode_down", p, "sm_90") == MEASURED
    assert tile_of("decode_down", p, "sm_80") != MEASURED  # measured elsewhere
    assert tile_of("decode_h", p, "sm_90").splits == 1
    assert tile_of("decode_down", replace(p, hidden_size=4096), "sm_90") != MEASURED
    assert tile_of("decode_down", replace(p, itemsize=4), "sm_90") != MEASURED
    assert tile_of("decode_down", replace(p, rank_down=0), "sm_90") != MEASURED
    assert tile_of("decode_down", replace(p, rank_down=150), "sm_90") == MEASURED
    assert tile_of("decode_down", p, "interpreter").splits == 2
    about = json.loads((tuned / "sm_90.json").read_text())
    assert about["device"] == "a GPU" and about["triton"] == "3.8.0"
    assert sorted(path.name for path in tuned.iterdir()) == ["sm_90.json"]  # nothing half-written is left


def test_the_nearest_number_of_tokens_serves(tuned):
    p, table = REAL["qwen3"], []
    for tokens, splits in ((1, 5), (8, 6), (64, 7)):
        table.append(("decode_down", replace(p, tokens=tokens), replace(MEASURED, splits=splits)))
    heuristics.write_table(tuned / "sm_90.json", table)
    for tokens, splits in ((1, 5), (2, 5), (3, 6), (16, 6), (20, 7), (24, 7), (64, 7)):
        tile = tile_of("decode_down", replace(p, tokens=tokens), "sm_90")
        assert (tile.splits, tile.tokens) == (splits, max(16, 1 << (tokens - 1).bit_length()))


def test_a_measured_tile_that_does_not_fit_more_tokens_gives_way(tuned):
    large = Tile(16, 64, 256, stages=5)  # 200 KiB with 16 tokens, 320 with 64
    heuristics.write_table(tuned / "sm_90.json", [("decode_x", REAL["qwen3"], large)])
    assert tile_of("decode_x", REAL["qwen3"], "sm_90") == large
    assert tile_of("decode_x", replace(REAL["qwen3"], tokens=64), "sm_90").depth == 64


def test_a_table_is_written_whole_or_not_at_all(tuned, monkeypatch):
    p, path = REAL["qwen3"], tuned / "sm_90.json"
    heuristics.write_table(path, [("decode_down", p, MEASURED)])
    before = path.read_text()
    monkeypatch.setattr(heuristics.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        heuristics.write_table(path, [("decode_down", p, replace(MEASURED, splits=9))])
    assert path.read_text() == before


def test_a_device_has_its_own_numbers_and_table(tuned, monkeypatch):
    """An H200 is an sm_90 with 1.4 times an H100's bandwidth: its loads reach further ahead; its table is its own."""
    monkeypatch.setattr(heuristics, "_met", {})
    device, p = "sm_90 NVIDIA H200", replace(REAL["qwen3"], tokens=1)
    assert heuristics.gpu_of(device) == GPUS["sm_90"]  # not met yet
    heuristics.meet(device, units=132, shared=0, gb_per_s=4917)
    assert heuristics.gpu_of(device) == replace(GPUS["sm_90"], gb_per_s=4917)
    heuristics.forget()
    assert tile_of("decode_x", p, device).stages > tile_of("decode_x", p, "sm_90").stages
    heuristics.meet("sm_103 NVIDIA B300", units=148, shared=227 << 10, gb_per_s=8000)
    assert heuristics.gpu_of("sm_103 NVIDIA B300").gb_per_s == 8000 and heuristics.gpu_of("sm_103") == GPUS["sm_89"]
    heuristics.write_table(heuristics.table_of(device), [("decode_down", p, MEASURED)])
    assert [path.name for path in tuned.iterdir()] == ["NVIDIA_H200.json"]
    assert tile_of("decode_down", p, device) == MEASURED
    assert tile_of("decode_down", p, "sm_90") != MEASURED and tile_of("decode_down", p, "sm_90 NVIDIA H20") != MEASURED


@pytest.mark.parametrize("groups", [16, 32, 128])
def test_programs_share_the_groups_of_downs_base(groups):
    """A program that loops over all of them leaves half of the GPU idle: tiles alone are 32 at H = 2048."""
    p = replace(REAL["qwen3"], tokens=64, groups=groups, rank_gate_up=0, rank_down=0)
    tile = tile_of("decode_h", p, "sm_90")
    assert heuristics.base_splits(tile, groups) == min(groups, tile.splits, heuristics.BASE_SPLITS) > 1
    assert ceil(p.hidden_size / tile.rows) * heuristics.base_splits(tile, groups) >= min(132, 16 * groups)


def test_tables_are_packaged(repo, tmp_path):
    assert repo / "resmoe_kernels" / "tuned" == heuristics.TUNED
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((repo / name).read_bytes())
    for folder in ("resmoe_kernels", "python_ops"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text('__version__ = "0"\n')
    (tmp_path / "resmoe_kernels" / "tuned").mkdir()
    (tmp_path / "resmoe_kernels" / "tuned" / "sm_90.json").write_text("{}")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "built" / "resmoe_kernels" / "tuned" / "sm_90.json").is_file()
