"""The command line: what it prints, and what it says in one line when the input is wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import resmoe_kernels as rk
from resmoe_kernels.python_ops.cli import inspect_checkpoint, main
from resmoe_kernels.python_ops.storage.model_files import INDEX, SINGLE
from tests import families

pytestmark = pytest.mark.usefixtures("one_thread")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """run(*arguments): the command line in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["resmoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
            raise SystemExit(0)
        code = exit.value.code
        return Result(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return call


def tree(folder: Path) -> dict[str, str]:
    """Every file, folder and link below ``folder`` with a digest of what it holds."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """A tiny Mixtral in several shards, with a tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "dense"
    torch.manual_seed(0)
    config = families.CONFIGS["mixtral"]()
    config.vocab_size = 4096  # the tokenizer's
    transformers.MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    for path in (repo / "examples" / "tiny-mixtral").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def factored(dense: Path) -> Path:
    """The same, compressed. Not to be changed."""
    return rk.compress(dense, dense.with_name("factored"), progress=False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The cat sat on the mat, and the dog lay under the table. " * 20)
    return path


# ---- what the commands do


def test_compress_prints_what_inspect_prints(run, dense, tmp_path):
    done = run("compress", dense, tmp_path / "out", "--method", "resmoe", "--residual", "lowrank", "--retain", "0.25")
    assert done.code == 0
    assert "model.layers.0" in done.out and "low rank" in done.out
    assert run("inspect", tmp_path / "out") == (0, done.out, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_every_option_reaches_the_method(run, dense, tmp_path):
    options = {
        "method": "resmoe",
        "residual": "sparse",
        "retain": 0.375,
        "factorization": "joint",
        "sparse_layout": "bitmap",
        "budget": "error",
        "init": "mean",
        "solver": "pot",
        "layers": "last:1",
    }
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("compress", dense, tmp_path / "out", *flags).code == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["settings"] == options
    assert list(stored["layers"]) == ["model.layers.1.mlp.experts"]


def test_defaults_of_the_command_are_those_of_the_function(run, dense, factored):
    before = tree(factored.parent)
    assert run("compress", dense, factored).code == 0
    assert tree(factored.parent) == before


def test_run_again_does_nothing(run, dense, tmp_path):
    first = run("compress", dense, tmp_path / "out")
    before = tree(tmp_path)
    second = run("compress", dense, tmp_path / "out")
    assert (second.code, second.out) == (0, first.out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "form", "density"),
    [
        ([], "base x1 + low rank (stacked)", None),
        (["--factorization", "joint"], "base x1 + low rank (joint)", None),
        (["--residual", "sparse"], "base x1 + block 8:32", (0.25, 0.34)),  # 48 columns are a word and a half
        (["--residual", "sparse", "--retain", "0.5"], "base x1 + block 16:32", (0.5, 0.67)),
        (["--residual", "sparse", "--sparse-layout", "bitmap"], "base x1 + bitmap", (0.2499, 0.25)),
    ],
)
def test_inspect_json_agrees_with_the_tensors(flags, form, density, run, dense, tmp_path):
    assert run("compress", dense, tmp_path / "out", *flags).code == 0
    done = run("inspect", tmp_path / "out", "--json")
    assert done.code == 0 and done.err == ""
    rows = json.loads(done.out)
    assert [row["path"] for row in rows] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    tensors = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    for row in rows:
        mine = {name: t for name, t in tensors.items() if name.startswith(row["path"])}
        assert row["bytes_now"] == sum(t.numel() * t.element_size() for t in mine.values())
        assert row["bytes_dense"] == 4 * 3 * 32 * 48 * 4
        assert row["form"] == form
        assert 0 < row["relative_error"] < 1
        if density is None:
            assert row["density"] is None
            ranks = {m: len(mine[f"{row['path']}.u_{m}"]) / 4 for m in row["mean_rank"]}
            assert row["mean_rank"] == ranks
        else:
            assert row["mean_rank"] is None
            assert density[0] <= row["density"] <= density[1]
    # Every byte of the experts' files is one that inspect counts, or belongs to a header.
    files = sum(p.stat().st_size for p in (tmp_path / "out").glob("experts-*"))
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in (tmp_path / "out").glob("experts-*"))
    assert sum(row["bytes_now"] for row in rows) == files - headers


def test_inspect_loses_no_digit(run, factored):
    """Not to the 80 columns that a pipe is taken to have, either."""
    *_, first, second, total, _ = run("inspect", factored).out.splitlines()
    rows = inspect_checkpoint(factored)
    for line, row in zip((first, second), rows, strict=True):
        for word in (row["path"], row["form"], f"{row['bytes_dense']:,}", f"{row['bytes_now']:,}"):
            assert word in line
    now, dense = (sum(row[key] for row in rows) for key in ("bytes_now", "bytes_dense"))
    assert " all " in total and f"{now:,}" in total and f"{dense:,}" in total and f"{now / dense:.3f}" in total


def test_eval_of_two_models(run, dense, factored, text):
    done = run("eval", dense, factored, "--text", text, "--stride", "16", "--json")
    assert done.code == 0
    rows = json.loads(done.out)  # and nothing else on stdout
    assert list(rows) == [str(dense), str(factored)]
    assert rows[str(dense)]["expert_bytes"] == 2 * 4 * 3 * 32 * 48 * 4
    assert rows[str(factored)]["expert_bytes"] == sum(row["bytes_now"] for row in inspect_checkpoint(factored))
    for row in rows.values():
        assert row["tokens"] > 100 and math.exp(row["nll_per_token"]) == pytest.approx(row["perplexity"])
    assert rows[str(dense)]["perplexity"] != rows[str(factored)]["perplexity"]
    assert "kl" not in rows[str(dense)]
    assert 0 < rows[str(factored)]["kl"] <= rows[str(factored)]["kl_99"]
    assert 0 < rows[str(factored)]["same_first_choice"] <= 1

    table = run("eval", dense, "--text", text, "--stride", "16")
    assert table.code == 0 and "perplexity" in table.out and f"{rows[str(dense)]['perplexity']:,.4g}" in table.out


def test_eval_stride_of_a_short_window(run, dense, text):
    """512 unless the model's window, here 64, is shorter; a stride that is given is taken as it is."""
    default = run("eval", dense, "--text", text, "--limit", "200", "--json")
    given = run("eval", dense, "--text", text, "--limit", "200", "--stride", "64", "--json")
    scores = [json.loads(done.out)[str(dense)]["perplexity"] for done in (default, given)]
    assert scores[0] == scores[1]
    refused(run("eval", dense, "--text", text, "--stride", "65"), "stride must be")


def test_generate(run, dense, factored):
    done = run("generate", factored, "--prompt", "The cat", "--max-new-tokens", 5)
    assert done.code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(factored)
    model = transformers.AutoModelForCausalLM.from_pretrained(factored)
    ids = tokenizer("The cat", return_tensors="pt").input_ids
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert done.out == tokenizer.decode(ids[0, -5:], skip_special_tokens=True) + "\n"


def test_python_dash_m_is_the_same_command_line(factored, tmp_path):
    command = [sys.executable, "-m", "resmoe_kernels", "inspect", str(factored), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout) == inspect_checkpoint(factored)
    command[-2:] = [str(tmp_path / "gone")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'gone'}: no such model folder (download a hub model first)\n"


@pytest.mark.parametrize("command", ["compress", "inspect", "eval", "generate"])
def test_help(command, run):
    done = run(command, "--help")
    assert done.code == 0 and "Usage" in done.out


# ---- what is wrong with the input


def refused(done: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line of error; progress bars may stand before it."""
    assert done.code == 2 and done.out == ""
    assert "Traceback" not in done.err
    *before, last = done.err.splitlines()
    assert last.startswith("error: ") and not any("error: " in line for line in before), done.err
    for word in words:
        assert word in last, last


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensor(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Puts what ``edit`` returns in a tensor's place; None removes the tensor."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    changed = edit(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, path, metadata={"format": "pt"})


def put(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return edit


def replaced_by(model: Callable[[], torch.nn.Module]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shutil.rmtree(folder)
        model().save_pretrained(folder)  # type: ignore[operator]

    return edit


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def cut(size: Callable[[int], int]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = last_shard(folder).read_bytes()
        last_shard(folder).write_bytes(data[: size(len(data))])

    return edit


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config)


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"
# What is done to a copy of the model, and what the line then says. Each holds for compress.
BAD_MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (shutil.rmtree, ["model: no such model folder"]),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("")), ["model: no such model folder"]),
    "without config.json": (lambda f: (f / "config.json").unlink(), ["model: no config.json"]),
    "config.json cut off": (
        lambda f: (f / "config.json").write_text('{"a": '),
        ["config.json: not valid JSON"],
    ),
    "config.json a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ["config.json: must be a JSON object"],
    ),
    "config.json empty": (
        lambda f: (f / "config.json").write_text("{}"),
        ["cannot build this model", "model_type"],
    ),
    "unknown model_type": (
        lambda f: edit_config(f, model_type="no_such", architectures=["NoSuchForCausalLM"]),
        ["cannot build this model", "no_such"],
    ),
    "a config of wrong types": (
        lambda f: edit_config(f, hidden_size="many"),
        ["cannot build this model", "hidden_size"],
    ),
    "a config of wrong values": (
        lambda f: edit_config(f, hidden_act="nope"),
        ["cannot build this model", "nope"],
    ),
    "a missing shard": (
        lambda f: last_shard(f).unlink(),
        ["safetensors: this shard of the checkpoint is missing"],
    ),
    "an empty shard": (cut(lambda size: 0), ["truncated or damaged safetensors file of 0 bytes"]),
    "a shard cut in the length": (cut(lambda size: 7), ["truncated or damaged safetensors file of 7 bytes"]),
    "a shard cut in the header": (
        cut(lambda size: 40),
        ["truncated or damaged safetensors file of 40 bytes"],
    ),
    "a shard cut in the data": (cut(lambda size: size - 1), ["truncated or damaged safetensors file of"]),
    "a shard lacks a tensor": (
        lambda f: edit_tensor(f, W1, lambda t: None),
        [f"lacks {W1}, which the index places there"],
    ),
    "an index cut off": (lambda f: (f / INDEX).write_text("{"), [f"{INDEX}: not valid JSON"]),
    "an index that leads out": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        [f"{INDEX}: weight_map must name a file of this folder"],
    ),
    "only pickles": (only_pickles, ["only pickle weights (pytorch_model.bin); convert them"]),
    "NaN in an expert": (
        lambda f: edit_tensor(f, W1, put((3, 4), math.nan)),
        [f"error: {W1}: all weights must be finite, got nan at (3, 4)"],
    ),
    "Inf in an expert": (
        lambda f: edit_tensor(f, W1, put((0, 0), -math.inf)),
        [f"error: {W1}: all weights must be finite, got -inf at (0, 0)"],
    ),
    "NaN elsewhere": (
        lambda f: edit_tensor(f, "model.norm.weight", put((31,), math.nan)),
        ["error: model.norm.weight: all weights must be finite, got nan at (31,)"],
    ),
    "Inf elsewhere": (
        lambda f: edit_tensor(f, GATE, put((1, 2), math.inf)),
        [f"error: {GATE}: all weights must be finite, got inf at (1, 2)"],
    ),
    "fewer experts than config.json says": (
        lambda f: edit_config(f, num_local_experts=5),
        ["config.json wants (5, 32), the checkpoint has (4, 32)"],
    ),
    "another intermediate size": (
        lambda f: edit_config(f, intermediate_size=64),
        ["experts.gate_up_proj: config.json wants (4, 128, 32), the checkpoint has (4, 96, 32)"],
    ),
    "another vocabulary": (
        lambda f: edit_config(f, vocab_size=64),
        ["config.json wants (64, 32), the checkpoint has"],
    ),
    "more layers than there are": (
        lambda f: edit_config(f, num_hidden_layers=3),
        ["no tensor in the checkpoint makes model.layers.2.mlp.experts.gate_up_proj"],
    ),
    "an expert in fp8": (
        lambda f: edit_tensor(f, W1, lambda t: t.to(torch.float8_e4m3fn)),
        [f"error: {W1}: must be float16, bfloat16, float32 or float64, got float8_e4m3fn"],
    ),
    "quantised to gptq": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["model: holds gptq-quantised weights; start from an unquantised checkpoint"],
    ),
    "without experts": (
        replaced_by(llama),
        ["LlamaForCausalLM holds no experts modules: nothing to compress"],
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_compress_a_bad_model(spoil, words, run, dense, tmp_path):
    model = shutil.copytree(dense, tmp_path / "model")
    spoil(model)
    before = tree(tmp_path)
    refused(run("compress", model, tmp_path / "out"), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "magic"], ["method: 'magic' is not known; known are resmoe"]),
        (["--residual", "none"], ["residual: must be one of lowrank, sparse, full, got 'none'"]),
        (
            ["--residual", "sparse", "--sparse-layout", "csr"],
            ["sparse_layout: must be one of block, bitmap, got 'csr'"],
        ),
        (["--factorization", "qr"], ["factorization: must be one of stacked, separate, joint, got 'qr'"]),
        (["--init", "last"], ["init: ", "'last'"]),
        (["--solver", "guess"], ["solver: ", "'guess'"]),
        (["--retain", "0"], ["retain: must be in (0, 1], got 0.0"]),
        (["--retain", "-1"], ["retain: must be in (0, 1], got -1.0"]),
        (["--retain", "1.5"], ["retain: must be in (0, 1], got 1.5"]),
        (["--retain", "nan"], ["retain: must be in (0, 1], got nan"]),
        (["--retain", "inf"], ["retain: must be in (0, 1], got inf"]),
        (
            ["--residual", "sparse", "--retain", "0.51"],
            ["retain: the block layout keeps at most 16 of 32", "got 0.51"],
        ),
        *(
            (
                ["--layers", layers],
                ["layers: must be 'all', 'first:N', 'last:N' or numbers", f"got {layers!r}"],
            )
            for layers in (
                "",
                "some",
                "first",
                "first:0",
                "first:3",
                "last:-1",
                "2",
                "0-2",
                "1-0",
                "-1",
                "0,",
                "0,5",
                "0.5",
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and str(value[0]).startswith("--") else "",
)
def test_compress_with_bad_settings(flags, words, run, dense, tmp_path):
    refused(run("compress", dense, tmp_path / "out", *flags), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--retain", "much"], ["--retain: must be float, got 'much'"]),
        (["--retain=much"], ["--retain: must be float, got 'much'"]),
        (["--method", "mc-smoe", "--groups", "two"], ["--groups: must be int or none, got 'two'"]),
        (["--method", "mc-smoe", "--align", "maybe"], ["--align: must be true or false, got 'maybe'"]),
        (["--rank", "3"], ["--rank: not a setting of resmoe; known are --residual, --retain"]),
        (["--retain"], ["--retain: needs a value"]),
        (["more"], ["compress: got the word 'more', expected --name value"]),
        (
            ["--calibration", "text.txt", "--residual", "sparse"],
            ["calibration: resmoe uses no calibration with these settings; leave it out"],
        ),
        (["--method", "mc-smoe"], ["calibration: mc-smoe needs a text to see how the experts are used"]),
        (["--method", "resmoe+xmoe"], ["method: only xmoe can come before another method", "'resmoe+xmoe'"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_compress_with_words_that_mean_nothing(flags, words, run, dense, tmp_path):
    refused(run("compress", dense, tmp_path / "out", *flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_listed(run):
    done = run("settings", "resmoe")
    assert done.code == 0 and "--retain" in done.out and "0.25" in done.out
    refused(run("settings", "magic"), "method: 'magic' is not known; known are resmoe")


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


def a_folder_with_another_model(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "mixtral", "quantization_config": {"quant_method": "fp8"}}')


def a_folder_with_a_broken_config(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (a_file, ["out: exists and is not a folder; choose another name"]),
        (a_folder, ["out: exists and is not a checkpoint made by this command; choose another folder"]),
        (a_folder_with_another_model, ["out: exists and is not a checkpoint made by this command"]),
        (a_folder_with_a_broken_config, ["out/config.json: not valid JSON"]),
    ],
)
def test_compress_onto_something_else(there, words, run, dense, tmp_path):
    there(tmp_path / "out")
    before = tree(tmp_path)
    refused(run("compress", dense, tmp_path / "out"), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "flags", [["--retain", "0.5"], ["--layers", "0"], ["--residual", "sparse"], ["--init", "mean"]]
)
def test_compress_onto_the_same_model_with_other_settings(flags, run, dense, factored):
    before = tree(factored.parent)
    refused(
        run("compress", dense, factored, *flags),
        "factored: holds a factored checkpoint made with other settings",
    )
    assert tree(factored.parent) == before


def test_compress_onto_another_model(run, dense, tmp_path):
    """One number of one weight differs, or one of the config."""
    model = shutil.copytree(dense, tmp_path / "model")
    rk.compress(model, tmp_path / "out", progress=False)
    original = last_shard(model).read_bytes()
    edit_tensor(model, "model.norm.weight", put((0,), 0.5))
    before = tree(tmp_path)
    refused(run("compress", model, tmp_path / "out"), "out: holds a factored checkpoint of another model")
    assert tree(tmp_path) == before
    last_shard(model).write_bytes(original)
    edit_config(model, rms_norm_eps=1e-3)
    refused(run("compress", model, tmp_path / "out"), "out: holds a factored checkpoint of another model")


def test_compress_into_a_folder_that_is_not_there(run, dense, tmp_path):
    refused(
        run("compress", dense, tmp_path / "a" / "out"),
        f"{tmp_path / 'a'}: no such folder to make out in; make it first",
    )
    (tmp_path / "file").write_text("")
    refused(run("compress", dense, tmp_path / "file" / "out"), "file: no such folder to make out in")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", [".", "out", "code/out", "../model", "../link/out"])
def test_compress_into_the_model_itself(place, run, dense, tmp_path):
    model = shutil.copytree(dense, tmp_path / "model")
    (model / "code").mkdir()
    (tmp_path / "link").symlink_to(model)
    before = tree(tmp_path)
    done = run("compress", model, model / place)
    refused(done, "lies in the folder of the model to compress; choose a folder outside of it")
    assert tree(tmp_path) == before


def test_compress_a_folder_that_holds_the_model(run, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "out" / "model")
    before = tree(tmp_path)
    refused(
        run("compress", tmp_path / "out" / "model", tmp_path / "out"),
        "is not a checkpoint made by this command",
    )
    assert tree(tmp_path) == before


def test_compress_what_is_compressed(run, factored, tmp_path):
    refused(
        run("compress", factored, tmp_path / "out"),
        "holds resmoe-quantised weights; it is compressed already",
    )
    assert list(tmp_path.iterdir()) == []


def test_compress_beside_an_unfinished_job(run, dense, tmp_path, monkeypatch):
    """Refused with other settings; finished by the same ones."""
    monkeypatch.setattr("resmoe_kernels.python_ops.jobs.compress.publish", lambda *_: sys.exit(3))
    assert run("compress", dense, tmp_path / "out").code == 3
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [".out.unfinished"]
    before = tree(tmp_path)
    done = run("compress", dense, tmp_path / "out", "--retain", "0.5")
    refused(done, ".out.unfinished: holds an unfinished job with other settings or another model; run that command")
    assert tree(tmp_path) == before
    assert run("compress", dense, tmp_path / "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


READERS = {
    "inspect": ["inspect", "FOLDER"],
    "eval": ["eval", "FOLDER", "--text", "TEXT"],
    "generate": ["generate", "FOLDER", "--prompt", "The cat"],
}
readers = pytest.mark.parametrize("command", READERS.values(), ids=READERS)


def fill(command: list[str], folder: Path, text: Path) -> list[object]:
    return [{"FOLDER": folder, "TEXT": text}.get(word, word) for word in command]


def from_the_future(folder: Path) -> None:
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, "format_version": 3})


BAD_RESULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "from the future": (from_the_future, ["format_version 3, newer than the 2", "upgrade resmoe_kernels"]),
    "without its index": (lambda f: (f / INDEX).unlink(), [f"no {SINGLE} and no {INDEX}"]),
    "a layer's file missing": (
        lambda f: (f / "experts-00001.safetensors").unlink(),
        ["experts-00001.safetensors: this shard of the checkpoint is missing"],
    ),
    "a layer's file cut": (
        lambda f: os.truncate(f / "experts-00001.safetensors", 3000),
        ["experts-00001.safetensors: truncated or damaged safetensors file of 3000 bytes"],
    ),
    "without config.json": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "missing": (shutil.rmtree, ["no such model folder"]),
    "only pickles": (
        lambda f: (only_pickles(f), [p.unlink() for p in f.glob("experts-*")]),
        ["only pickle weights (pytorch_model.bin)"],
    ),
}


@readers
@pytest.mark.parametrize(("spoil", "words"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_read_a_bad_result(command, spoil, words, run, factored, text, tmp_path):
    folder = shutil.copytree(factored, tmp_path / "factored")
    spoil(folder)
    refused(run(*fill(command, folder, text)), *words)


def test_compress_in_codes_and_requantise(run, dense, tmp_path):
    """By part and by all, what inspect shows of it, and what is refused in one line."""
    coded = tmp_path / "coded"
    words = ("--residual", "full", "--base-bits", "8", "--residual-bits=4", "--group", "32")
    made = run("compress", dense, coded, *words)
    assert made.code == 0 and "base int8/32, values int4/32" in made.out and "base x1 + full residual" in made.out
    requantised = run("requantise", coded, tmp_path / "less", "--bits", "2", "--group", "32")
    assert (
        requantised.code == 0 and "base int2/32, values int2/32" in requantised.out and ", then 0." in requantised.out
    )
    rows = {f: json.loads(run("inspect", tmp_path / f, "--json").out) for f in ("coded", "less")}
    for row, less in zip(rows["coded"], rows["less"], strict=True):
        assert less["bits_per_weight"] < row["bits_per_weight"] < 16
        assert row["payloads"].startswith("base_gate_up=int8/32 ") and "values_down=int2/32" in less["payloads"]
        assert row["kept"] == {"gate_up": 1.0, "down": 1.0} and row["density"] is None
    refused(run("requantise", tmp_path / "less", tmp_path / "out", "--bits", "4"), "which has fewer bits than int4/128")
    refused(run("compress", dense, tmp_path / "out", "--bits", "6"), "bits: must be one of 16, 8, 4, 3, 2, or none")
    refused(run("compress", dense, tmp_path / "out", "--method", "quantise"), "bits: quantise needs 8, 4, 3 or 2")
    refused(run("requantise", dense, tmp_path / "out", "--bits", "4"), "is not a factored checkpoint")


def test_inspect_a_dense_model(run, dense):
    refused(run("inspect", dense), "dense: not a factored checkpoint (no quantization_config of method 'resmoe')")


@pytest.mark.parametrize("command", [READERS["eval"], READERS["generate"]], ids=["eval", "generate"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: edit_config(f, vocab_size=64), ["transformers cannot load this model"]),
        (
            lambda f: edit_config(f, hidden_size="many"),
            ["transformers cannot load this model", "hidden_size"],
        ),
        (
            lambda f: edit_config(f, model_type="no_such", architectures=["NoSuchForCausalLM"]),
            ["transformers cannot load this model", "no_such"],
        ),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ["transformers cannot load this model"]),
    ],
    ids=["another vocabulary", "a config of wrong types", "unknown model_type", "no tokenizer"],
)
def test_load_a_bad_model(command, spoil, words, run, dense, text, tmp_path):
    model = shutil.copytree(dense, tmp_path / "model")
    spoil(model)
    refused(run(*fill(command, model, text)), *words)


def test_eval_bad_text(run, dense, tmp_path):
    refused(
        run("eval", dense, "--text", tmp_path / "gone.txt"),
        "gone.txt: cannot be read: No such file or directory",
    )
    (tmp_path / "empty.txt").write_text("")
    refused(run("eval", dense, "--text", tmp_path / "empty.txt"), "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    refused(run("eval", dense, "--text", tmp_path / "bytes.txt"), "bytes.txt: must be UTF-8 text")
    refused(run("eval", dense), "nothing to evaluate; give text, lambada or piqa")
    refused(run("eval", dense, "--text", tmp_path), "cannot be read: Is a directory")


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--stride", "0"], ["stride"]), (["--limit", "0"], ["limit must be at least 1, got 0"])],
)
def test_eval_bad_numbers(flags, words, run, dense, text):
    refused(run("eval", dense, "--text", text, *flags), *words)


def test_generate_from_nothing(run, dense):
    refused(run("generate", dense, "--prompt", ""), "prompt: must hold at least one token, got ''")
    refused(run("generate", dense, "--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens")
