"""The search for tiles, with made-up times in place of a GPU's, and the table it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from math import log2

import pytest

from benchmarks.gpu import tune
from resmoe_kernels import heuristics
from resmoe_kernels.heuristics import DECODE_KERNELS, PREFILL_KERNELS, Problem, Tile, tile_of
from tests.conftest import REPO

DECODE = Problem(8, 8, 128, 2048, 768, True, 1, 216, 139, False, 2)
PREFILL = replace(DECODE, tokens=512)


class Timer:
    """Times that are least at ``best`` of each kernel, and grow with the distance; remembers what it was asked."""

    def __init__(self, best: dict[str, Tile], works=lambda kernel, tile: True) -> None:
        self.best, self.works, self.asked = best, works, []

    def __call__(self, tiles: dict[str, Tile]) -> float | None:
        self.asked.append(dict(tiles))
        if not all(self.works(kernel, tile) for kernel, tile in tiles.items()):
            return None
        away = 0.0
        for kernel, tile in tiles.items():
            for field in tune.RANGES:
                wanted = getattr(self.best[kernel], field)
                away += abs(log2(getattr(tile, field) / wanted))
        return 1 + away


def start(problem: Problem, target: str = "sm_90") -> dict[str, Tile]:
    return {kernel: tile_of(kernel, problem, target) for kernel in tune.kernels_of(problem, target)}


def test_the_search_finds_what_is_fastest():
    half = start(DECODE)["decode_gate_up"].splits // 2
    best = {
        "decode_x": Tile(16, 128, 32, 1, 8, 2),
        "decode_gate_up": Tile(16, 16, 128, half, 8, 5),
        "decode_h": Tile(16, 32, 64, 8, 4, 3),
        "decode_down": Tile(16, 32, 256, 2 * start(DECODE)["decode_down"].splits, 4, 4),
    }
    timer = Timer(best)
    assert tune.search(DECODE, "sm_90", start(DECODE), timer) == best
    assert len(timer.asked) < 150  # each is compiled
    best = {kernel: Tile(128, 32, 128, 1, 8, 2) for kernel in PREFILL_KERNELS}
    best["prefill_sum"] = replace(start(PREFILL)["prefill_sum"], tokens=32, rows=64)
    assert tune.search(PREFILL, "sm_90", start(PREFILL), Timer(best)) == best


def test_only_what_fits_is_tried():
    far = {kernel: Tile(16, 256, 512, 256, 16, 8) for kernel in DECODE_KERNELS}
    for problem in (DECODE, replace(DECODE, sparse=True)):
        timer = Timer(far)
        tune.search(problem, "sm_89", start(problem, "sm_89"), timer)
        for tiles in timer.asked:
            for kernel, tile in tiles.items():
                assert tile.tokens == 16 and heuristics.shared_bytes(kernel, problem, tile) <= 99 << 10
                assert tile.splits == 1 or kernel != "decode_x"
                assert tile.depth >= (32 if problem.sparse else 16)


def test_what_is_wrong_or_within_noise_is_not_taken():
    defaults = start(DECODE)
    wished = {kernel: replace(tile, rows=16, depth=256) for kernel, tile in defaults.items()}
    fails = Timer(wished, works=lambda kernel, tile: tile in defaults.values())
    assert tune.search(DECODE, "sm_90", defaults, fails) == defaults
    times = iter([1.0] + [0.995] * 1000)
    assert tune.search(DECODE, "sm_90", defaults, lambda tiles: next(times)) == defaults
    with pytest.raises(ValueError, match="tune: the default tiles do not work for Problem"):
        tune.search(DECODE, "sm_90", defaults, lambda tiles: None)


def test_tiles_are_in_force_within_and_forgotten_after(tmp_path, monkeypatch):
    monkeypatch.setattr(heuristics, "TUNED", tmp_path)
    heuristics.forget()
    defaults = start(DECODE)
    tiles = {**defaults, "decode_h": Tile(16, 16, 32, 1, 2, 2)}
    with pytest.raises(KeyError), tune.tiles_in_force(DECODE, "sm_90", tiles):
        assert start(DECODE) == tiles and tmp_path != heuristics.TUNED
        raise KeyError
    assert start(DECODE) == defaults and tmp_path == heuristics.TUNED and not list(tmp_path.iterdir())


def test_a_table_grows_problem_by_problem(tmp_path):
    path = tmp_path / "new" / "sm_90.json"
    first, second = start(DECODE), start(PREFILL)
    tune.add_to_table(path, DECODE, first, device="a GPU")
    tune.add_to_table(path, PREFILL, second, device="a GPU")
    changed = {**first, "decode_h": Tile(16, 16, 32, 1, 2, 2)}
    tune.add_to_table(path, DECODE, changed, device="a GPU")
    table = heuristics.read_table(path)
    assert {kernel: tile for kernel, problem, tile in table if problem == DECODE} == changed
    assert {kernel: tile for kernel, problem, tile in table if problem == PREFILL} == second
    assert len(table) == 8


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu.tune"]
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "tune.py measures on a GPU, and torch finds none; the defaults of heuristics.py stay\n"
