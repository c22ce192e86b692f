"""However a command ends, its user reads one sentence, which says whose fault it is."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.python_ops import terminal
from resmoe_kernels.python_ops.solvers.apportion import apportion
from resmoe_kernels.python_ops.terminal import end_of, printable, told_in_a_sentence


def raised(action) -> BaseException:
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


def wrapped() -> None:
    try:
        raise MemoryError
    except MemoryError as error:
        raise ValueError("the model cannot be loaded") from error


def of_a_library(error: BaseException):
    """An error as a library raises it: from a file beside the package."""

    def action() -> None:
        raise error

    return action


CASES = {
    "the user's": (lambda: apportion([1.0], 3, [0], [2]), 2, r"error: total: must be in \[0, 2\], got 3"),
    "the user's file": (lambda: Path("/nowhere").read_text(), 2, r"error: \[Errno 2\] .*'/nowhere'"),
    "ours": (
        lambda: apportion(None, 1, [0], [1]),  # type: ignore[arg-type]
        1,
        r"error: internal: TypeError: .*; this is a fault of resmoe, not of your input; .* RESMOE_TRACEBACK=1 prints",
    ),
    "a library's": (
        lambda: torch.nn.functional.interpolate(torch.ones(1), size=(2,)),
        2,
        r"error: torch: ValueError: Input and output must .*; RESMOE_TRACEBACK=1 shows where it comes from",
    ),
    "a library's own fault": (
        lambda: json.dumps(object()),
        1,
        r"error: builtins: TypeError: .*; RESMOE_TRACEBACK=1 shows",
    ),
    "memory": (
        of_a_library(RuntimeError("unable to mmap 12 bytes: Cannot allocate memory (12)")),
        2,
        "error: memory: .*mmap",
    ),
    "memory without words": (of_a_library(MemoryError()), 2, "error: memory: none was left; free some"),
    "memory beneath": (wrapped, 2, "error: memory: the model cannot be loaded; free some"),
    "disk": (of_a_library(OSError(errno.ENOSPC, "No space left on device", "x")), 2, "error: disk: .*; make room"),
    "disk, of safetensors": (
        of_a_library(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        2,
        "error: disk: Error while serializing.*; make room and run the same command again",
    ),
    "interrupt": (of_a_library(terminal.Stopped(signal.SIGINT)), 130, "stopped by SIGINT: what is whole is kept"),
    "end": (of_a_library(terminal.Stopped(signal.SIGTERM)), 143, "stopped by SIGTERM: what is whole is kept"),
}


@pytest.mark.parametrize("name", CASES)
def test_end_of(name):
    action, code, sentence = CASES[name]
    end = end_of(raised(action))
    assert end.code == code
    assert re.fullmatch(f"{sentence}.*", end.sentence), end.sentence


def test_a_sentence_and_no_traceback(capsys, monkeypatch):
    for asked in (False, True):
        monkeypatch.setenv("RESMOE_TRACEBACK", "1" if asked else "")
        with pytest.raises(SystemExit) as ended, told_in_a_sentence():
            FactoredExperts(None)  # type: ignore[call-arg]
        said = capsys.readouterr().err
        assert ended.value.code == 1
        assert ("Traceback" in said) == asked
        assert said.splitlines()[-1].startswith("error: ")


NASTY = "a\x1b]0;title\x07b\x9b31m\u202ec\nd\te ünï 模型"


def test_printable():
    assert printable(NASTY) == "a\\x1b]0;title\\x07b\\x9b31m\\u202ec\nd\te ünï 模型"


def test_nothing_in_a_name_reaches_the_terminal(capsys, tmp_path):
    with pytest.raises(SystemExit), told_in_a_sentence():
        logging.getLogger("resmoe_kernels").warning("layer %s", NASTY)
        raise OSError(NASTY)
    said = capsys.readouterr().err
    assert said.count("\\x1b]0;title") == 2 and "\x1b" not in said and "\x07" not in said


def test_names_of_layers_and_folders(capsys, monkeypatch, tmp_path):
    from resmoe_kernels.python_ops import cli

    table = cli.Table(cli._name("[bold]" + NASTY), cli._name("x"))
    table.add_row(cli._name(NASTY), "")
    cli._print(table)
    said = capsys.readouterr().out
    assert "\x1b]" not in said and "[bold]" in said and said.count("\\x9b31m") == 2


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with told_in_a_sentence():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number, tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from resmoe_kernels.python_ops.terminal import told_in_a_sentence\n"
        "with told_in_a_sentence():\n"
        "    pathlib.Path(sys.argv[1]).touch()\n"
        "    try: time.sleep(60)\n"
        "    finally: print('cleaned', flush=True)\n"
    )
    ready = tmp_path / "ready"
    process = subprocess.Popen([sys.executable, "-c", code, ready], stdout=-1, stderr=-1, text=True)
    for _ in range(600):
        if ready.exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out == "cleaned\n"
    assert error.startswith(f"stopped by {number.name}: ") and error.count("\n") == 1


def test_little_memory_is_a_sentence(repo, tmp_path):
    """Address space for torch and not for the mapped model."""
    command = (
        "import resource, sys\n"
        "import resmoe_kernels.python_ops.jobs.compress, transformers.models.mixtral.modeling_mixtral\n"
        "from resmoe_kernels.python_ops.cli import main\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (20 << 20), size + (20 << 20)))\n"
        "main()\n"
    )
    arguments = ["compress", str(repo / "examples" / "tiny-mixtral"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("error: memory: ")
    assert not (tmp_path / "out").exists()
