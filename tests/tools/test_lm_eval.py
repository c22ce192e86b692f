"""The lm-eval adapter, on a task made here: no network, and the same numbers as evaluate()."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

if "CI" not in os.environ:
    for package in ("lm_eval", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'resmoe_kernels[eval]'")

import datasets
import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from transformers import AutoModelForCausalLM, AutoTokenizer

from resmoe_kernels.python_ops.jobs.compress import compress
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.tools.evaluate import evaluate
from resmoe_kernels.python_ops.tools.lm_eval_model import ResMoELM

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-mixtral"  # absolute: not taken for a name on the hub
ROWS = [
    {"context": "The function returns a copy of the", "word": " list"},
    {"context": "It was the best of times, it was the worst of", "word": " times"},
    {"context": "My fellow citizens, we are here to serve the people of the United", "word": " States"},
    {"context": "To be, or not to be, that is the", "word": " question"},
]


TASK = {
    "task": "last_word",
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{word}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row["context"] + row["word"]}) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def expected(rows) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return evaluate(model, AutoTokenizer.from_pretrained(FOLDER), lambada=rows, progress=False)


def check(results: dict, expected: dict[str, float]) -> None:
    got = results["results"]["last_word"]
    assert got["perplexity,none"] == pytest.approx(expected["lambada_perplexity"], rel=1e-4)
    assert got["acc,none"] == expected["lambada_accuracy"]
    assert 0 < expected["lambada_accuracy"] < 1  # else the comparison says little


def nll_and_accuracy(model: ResMoELM) -> tuple[float, float]:
    requests = [Instance("loglikelihood", row, (row["context"], row["word"]), i) for i, row in enumerate(ROWS)]
    scores = model.loglikelihood(requests, disable_tqdm=True)
    return -sum(logp for logp, _ in scores) / len(ROWS), sum(greedy for _, greedy in scores) / len(ROWS)


def test_a_folder_gives_evaluates_numbers(expected):
    model = ResMoELM(pretrained=str(FOLDER), dtype="float32", batch_size=3)
    nll, accuracy = nll_and_accuracy(model)
    assert math.exp(nll) == pytest.approx(expected["lambada_perplexity"], rel=1e-4)
    assert accuracy == expected["lambada_accuracy"]


def test_a_factored_folder_is_loaded_as_one(tmp_path, rows):
    out = compress(FOLDER, tmp_path / "out", layers="first:1", progress=False)
    model = ResMoELM(pretrained=str(out), dtype="float32")
    nll, accuracy = nll_and_accuracy(model)
    assert any(isinstance(module, FactoredExpertsLayer) for module in model.model.modules())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = evaluate(loaded, AutoTokenizer.from_pretrained(out), lambada=rows, progress=False)
    assert math.exp(nll) == pytest.approx(expected["lambada_perplexity"], rel=1e-4)
    assert accuracy == expected["lambada_accuracy"]


def test_simple_evaluate_of_a_loaded_model(expected):
    assert get_model("resmoe") is ResMoELM
    task = ConfigurableTask(config=TASK | {"custom_dataset": lambda: {"test": datasets.Dataset.from_list(ROWS)}})
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model = ResMoELM(pretrained=model, tokenizer=str(FOLDER))
    check(lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0), expected)


def test_command_line(tmp_path, expected):
    """lm-eval's own command line finds the model by name, and a task in a folder."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    # YAML reads JSON.
    dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    (tmp_path / "last_word.yaml").write_text(json.dumps(TASK | dataset))
    command = [sys.executable, "-m", "resmoe_kernels.python_ops.tools.lm_eval_model", "run", "--model", "resmoe"]
    command += ["--model_args", f"pretrained={FOLDER},dtype=float32", "--tasks", "last_word"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results.json")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    (written,) = tmp_path.glob("results*.json")
    check(json.loads(written.read_text()), expected)


def test_device_is_the_one_there_is_unless_given(monkeypatch):
    chosen = []

    def init(self, pretrained, device, **options):
        chosen.append((pretrained, device, options))

    monkeypatch.setattr(ResMoELM.__mro__[1], "__init__", init)
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        ResMoELM("folder", batch_size=2)
    ResMoELM("folder", device="cuda:1")
    assert chosen == [
        ("folder", "cuda", {"batch_size": 2}),
        ("folder", "cpu", {"batch_size": 2}),
        ("folder", "cuda:1", {}),
    ]


def test_only_the_adapter_imports_lm_eval():
    code = (
        "import sys, resmoe_kernels, resmoe_kernels.python_ops.tools.evaluate; "
        "assert 'transformers' in sys.modules and 'lm_eval' not in sys.modules, 'lm_eval was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
