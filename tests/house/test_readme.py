"""The README is true: its example runs, its commands parse, its paths exist."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import resmoe_kernels as rk
from resmoe_kernels.python_ops.cli import app, inspect_checkpoint
from resmoe_kernels.python_ops.methods.named import setting_types
from tests.conftest import REPO

README = (REPO / "README.md").read_text()


def test_the_python_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "examples").symlink_to(REPO / "examples")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"'perplexity': ([\d.]+)", result.stdout)[1]) < 4096  # better than guessing among all tokens
    assert (tmp_path / "tiny-mixtral-lowrank" / "config.json").is_file()


def test_the_demo_table_is_there_and_its_bytes_are_true(tmp_path):
    rows = dict(
        re.findall(r"^\| (dense|lowrank 0\.25|lowrank 0\.25, 4 bits|sparse 0\.25) \| ([\d,]+) \|", README, re.MULTILINE)
    )
    forms = {"lowrank 0.25": ("lowrank", 16), "lowrank 0.25, 4 bits": ("lowrank", 4), "sparse 0.25": ("sparse", 16)}
    assert rows.keys() == {"dense", *forms}
    for name, (residual, bits) in forms.items():
        dense, out = REPO / "examples" / "tiny-mixtral", tmp_path / name
        layers = inspect_checkpoint(rk.compress(dense, out, residual=residual, bits=bits, progress=False))
        assert rows["dense"] == f"{sum(layer['bytes_dense'] for layer in layers):,}"
        assert rows[name] == f"{sum(layer['bytes_now'] for layer in layers):,}"


def test_the_speeds_shown_are_those_of_the_results():
    """Speed-up and ideal of every cell, from the CSV that the benchmark wrote."""
    shapes = {"Mixtral": "mixtral", "DeepSeek": "dsv2lite", "Qwen3": "qwen3", "OLMoE": "olmoe", "Switch": "switch32"}
    forms = {"low rank": "lowrank", "block sparse": "block"}
    with (REPO / "benchmarks" / "results" / "experts.csv").open() as file:
        measured = {(r["shape"], r["tokens"], r["implementation"]): r for r in csv.DictReader(file)}
    tokens = re.search(r"^\| one layer, speed-up \(ideal\) \|(.*)\|$", README, re.MULTILINE)[1]
    tokens = [cell.split("=")[1].strip() for cell in tokens.split("|")]
    shown = re.findall(r"^\| (\w+)[^|]*, (low rank|block sparse) \|(.*)\|$", README, re.MULTILINE)
    assert len(shown) == len(shapes) * len(forms)
    for shape, form, cells in shown:
        for t, cell in zip(tokens, cells.split("|"), strict=True):
            row = measured[shapes[shape], t, f"resmoe {forms[form]}"]
            assert cell.strip() == f"{float(row['speedup']):.2f} ({float(row['ideal_speedup']):.2f})"


def test_the_speeds_of_codes_shown_are_those_of_the_results():
    with (REPO / "benchmarks" / "results" / "payloads.csv").open() as file:
        ms = {(r["shape"], r["tokens"], r["implementation"]): float(r["p50_ms"]) for r in csv.DictReader(file)}
    shapes = {"OLMoE": "olmoe", "Qwen3": "qwen3", "DeepSeek": "dsv2lite"}
    forms = {
        "base and low rank 25 % at 4 bits": "lowrank@4",
        "base 4 + codes of 3 bits": "base4+full3",
        "base 4 + codes of 2 bits": "base4+full2",
    }
    shown = re.findall(rf"^\| (\w+)[^|]*, ({'|'.join(map(re.escape, forms))}) \|(.*)\|$", README, re.MULTILINE)
    assert len(shown) == len(shapes) * len(forms)
    for shape, form, cells in shown:
        for t, cell in zip(("1", "16", "512"), cells.split("|"), strict=True):
            dense, plain, ours = (ms[shapes[shape], t, f"resmoe {name}"] for name in ("dense", "full4", forms[form]))
            assert cell.strip() == f"{dense / ours:.2f} / {plain / ours:.2f}"


COMMANDS = [shlex.split(line.split("#")[0]) for line in README.splitlines() if line.startswith("    resmoe ")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[1:3]))
def test_every_option_of_a_command_shown_exists(command):
    known = CliRunner().invoke(app, [command[1], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert known.exit_code == 0
    method = command[command.index("--method") + 1] if "--method" in command else "resmoe"
    settings = [f"--{name.replace('_', '-')}" for name in setting_types(method)] if command[1] == "compress" else []
    for option in (word for word in command if word.startswith("--")):
        assert option in known.output or option in settings


def test_the_commands_are_shown():
    assert {command[1] for command in COMMANDS} == {
        "diagnose",
        "compress",
        "requantise",
        "inspect",
        "eval",
        "generate",
        "settings",
    }


def test_the_make_targets_exist():
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (REPO / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_map_shows_what_is_there():
    (tree,) = re.findall(r"## Map\n\n(.*?)\n\n", README, re.DOTALL)
    parts = dict(re.findall(r"^    (\w+)/(.*?)(?=^    \w|\Z)", tree, re.MULTILINE | re.DOTALL))
    for folder, text in parts.items():
        for name in re.findall(r"\w+/|\w+\.(?:py|cpp|h)\b", text):
            assert (REPO / folder / name).exists(), f"{folder}/{name}"
    rooms = {path.parent.name for path in (REPO / "python_ops").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"(\w+)/", parts["python_ops"]))


def test_methods_said_to_be_here_are():
    from resmoe_kernels.python_ops.methods.named import METHODS

    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (yes|not yet) \|$", README, re.MULTILINE)
    assert {name for name, here in rows if here == "yes"} == set(METHODS)


def test_the_methods_table_says_what_was_measured():
    section = README.split("Measured on two small trained models")[1].split("`resmoe settings METHOD`")[0]
    model, checked = "", 0
    for line in section.splitlines():
        if found := re.match(r"\| (tiny-\w+), dense", line):
            model = found[1]
            assert re.search(r"dense ([\d.]+ / [\d]+\.\d)", line)[1] in shown(model, "dense").values()
        method = re.search(r"`([\w-]+)` \|", line)
        if not method or not line.startswith("|"):
            continue
        rows = shown(model, method[1])
        for share, perplexities in re.findall(r"([\d.]+): ([\d.]+ / [\d]+\.\d)", line):
            assert (share, perplexities) in rows
            checked += 1
    assert checked == 18
    parts = re.findall(r"([\d.]+ / [\d]+\.\d)", section.split("`xmoe` leaves")[1])
    assert len(parts) == 4 and set(parts) <= set(shown("tiny-mixtral", "xmoe").values())


def shown(model: str, method: str) -> dict[object, str]:
    """(share of the bytes, perplexities) of a method's rows, as the README writes them."""
    rows = {}
    with (REPO / f"benchmarks/results/methods-{model}.csv").open(newline="") as file:
        for i, row in enumerate(r for r in csv.DictReader(file) if r["method"] == method):
            perplexities = f"{float(row['perplexity_wikitext2-test']):.1f} / {float(row['perplexity_heldout']):.1f}"
            rows[i] = perplexities
            rows[f"{float(row['of_dense']):.3f}", perplexities] = perplexities
    return rows


def test_the_times_of_layers_are_those_of_the_results():
    section = README.split("How long it takes: one layer")[1].split("Nothing is trained by default")[0]
    with (REPO / "benchmarks/results/layer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        seconds = " | ".join(f"{float(row[name]):.0f} s" for name in ("align", "residual", "seconds"))
        memory = " | ".join(f"{float(row[name]):.1f} GiB" for name in ("peak_gib", "layer_gib"))
        assert f"| {row['experts']} | {seconds} | {memory} |" in section

    with (REPO / "benchmarks/results/assignment.csv").open(newline="") as file:
        measured = {(r["what"], r["experts"], r["n"], r["solver"]): r for r in csv.DictReader(file)}

    def seconds_of(*case: str) -> float:
        return float(measured[case]["seconds"])

    largest = ("assignment", "cosine 0.02", "14336")
    scores = seconds_of(*largest, "scores")
    exact, scipy = (seconds_of(*largest, solver) - scores for solver in ("exact", "scipy"))
    assert f"an exact assignment takes {exact:.1f} s beside the {scores:.1f} s of its scores" in section
    assert f"scipy's solver {scipy:.0f} s" in section


def test_the_gpu_section_says_what_the_accounts_and_the_compile_report_say():
    pytest.importorskip("triton")
    from resmoe_kernels.costs import Routing, layer_costs
    from tests.kernels.test_costs import ideal_bytes, problem, shapes

    rows = re.findall(r"^\| ([\w.-]+) \| ([\d.]+ \([\d.]+\).*) \|$", README.split("## On a GPU")[1], re.MULTILINE)
    assert [model for model, _ in rows] == ["Mixtral-8x7B", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "OLMoE-1B-7B"]
    for name, (_, cells) in zip(("mixtral", "dsv2lite", "qwen3", "olmoe"), rows, strict=True):
        shape, shown = shapes.SHAPES[name], re.findall(r"([\d.]+) \(([\d.]+)\)", cells)
        weights = shapes.layer_sizes(shape, "lowrank", 0.25)
        for T, numbers in zip((1, 8, 64), shown, strict=True):
            call = Routing.uniform(T, shape.top_k, weights), problem(weights, T, shape.top_k)
            moved = sum(cost.nbytes for cost in layer_costs(weights, *call, "sm_90"))
            assert [float(n) for n in numbers] == [round(n / 1e6, 1) for n in (moved, ideal_bytes(shape, "lowrank", T))]

    with (REPO / "benchmarks" / "results" / "compile.csv").open() as file:
        configurations = list(csv.DictReader(file))
    assert f"use, {len(configurations)} in all, " in README
    assert not any(row["loop_spills"] not in ("", "0") for row in configurations)


# ---- CONTRIBUTING.md

WALKED = re.findall(r"`([\w/]+\.\w+)(?::(\w+))?`", (REPO / "CONTRIBUTING.md").read_text())


@pytest.mark.parametrize(("file", "name"), sorted({step for step in WALKED if "/" in step[0]}))
def test_every_step_that_contributors_are_shown_is_there(file, name):
    """In the checkout, or, where the text is about one storey, in that."""
    (path,) = [p for p in (REPO / file, REPO / "python_ops" / file) if p.is_file()]
    assert re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))
