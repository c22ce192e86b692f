"""What a user of the command line is told when something ends a command: one sentence, for every kind of end."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import resmoe_kernels
from resmoe_kernels import python_ops

STOREYS = tuple(Path(module.__file__ or "").resolve().parent for module in (resmoe_kernels, python_ops))
TRACEBACK = "RESMOE_TRACEBACK"  # environment: =1 shows where an error comes from, as Python prints it
_MEMORY = (
    "unable to mmap",
    "failed to map segment",
    "cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
)
_DISK = ("no space left on device", "disk quota exceeded")


class Stopped(BaseException):
    """A signal that asks the command to end. No Exception, so that nothing that catches those keeps it."""

    def __init__(self, number: int) -> None:
        self.number = number


class End(NamedTuple):
    """sentence: for stderr;  code: of the exit: 2 what the user or the machine can change, 1 what neither can."""

    sentence: str
    code: int


def end_of(error: BaseException) -> End:
    """What to say of an exception that ended a command, and with which exit code.

    Where it was raised tells whose it is. A ValueError of this package is about the user's input, by its own rule; any
    other exception of this package is a fault of ours; one of a library is passed on with its name.
    """
    if isinstance(error, Stopped):
        name = signal.Signals(error.number).name
        told = f"stopped by {name}: what is whole is kept; a compression goes on with the same command"
        return End(told, 128 + error.number)
    chain = list(_chain(error))
    told = " ".join(str(error).split())
    kind = type(error).__name__ + (f": {told}" if told else "")
    text = " ".join(str(link) for link in chain).lower()
    if any(isinstance(link, MemoryError) for link in chain) or any(words in text for words in _MEMORY):
        advice = "free some, raise its limit (ulimit -v, a container's) or use a machine with more"
        return End(f"error: memory: {told or 'none was left'}; {advice}", 2)
    if any(words in text for words in _DISK) or any(getattr(link, "errno", None) == errno.ENOSPC for link in chain):
        return End(f"error: disk: {told}; make room and run the same command again", 2)
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    ours = any(where.is_relative_to(storey) for storey in STOREYS)
    if isinstance(error, OSError) or (ours and isinstance(error, ValueError)):
        return End(f"error: {told}", 2)
    if ours:
        advice = f"this is a fault of resmoe, not of your input; please report it with what {TRACEBACK}=1 prints"
        return End(f"error: internal: {kind}; {advice}", 1)
    owner = _library(where) or type(error).__module__.partition(".")[0]
    # A library's ValueError is mostly about what it was given, and that mostly by the user.
    code = 2 if isinstance(error, ValueError) else 1
    return End(f"error: {owner}: {kind}; {TRACEBACK}=1 shows where it comes from", code)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _library(file: Path) -> str | None:
    parts = file.parts
    return parts[parts.index("site-packages") + 1].removesuffix(".py") if "site-packages" in parts[:-1] else None


def printable(text: str) -> str:
    """The text with control characters, but for line ends and tabs, as they are written in Python: names of files and
    of tensors come from elsewhere, and a terminal obeys what is in them."""
    kept = "\n\t"
    return "".join(
        char if char in kept or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else ascii(char)[1:-1]
        for char in text
    )


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Around a command: ends the process with a sentence on stderr for whatever ends the command early."""
    log, handler = logging.getLogger("resmoe_kernels"), logging.StreamHandler()
    handler.setFormatter(_Printable())
    log.addHandler(handler)
    try:
        with _signals():
            yield
    except (Exception, Stopped) as error:
        if os.environ.get(TRACEBACK) == "1" and isinstance(error, Exception):
            traceback.print_exception(error)
        sentence, code = end_of(error)
        print(printable(sentence), file=sys.stderr)
        sys.exit(code)
    finally:
        log.removeHandler(handler)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped. Workers end first: who waits for them would wait for a layer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # asked again, it ends at once
        for child in multiprocessing.active_children():
            child.terminate()
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
