"""The folder in which a checkpoint grows, and what of it is whole.

Nothing in it is believed because of its name: a record beside every finished file says of which job it is and what
the file held, and is written once the file is on the disk.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from resmoe_kernels.python_ops.storage.digests import file_digest, text_digest
from resmoe_kernels.python_ops.storage.files import part_name, sync_folder, write_json
from resmoe_kernels.python_ops.storage.model_files import read_json

_log = logging.getLogger("resmoe_kernels")
_LOCK, _JOB = "lock", "job.json"  # the first to come and the last to go
_SEAL = "record"  # of a record: the digest of the rest of it
_FOLDERS = ("checkpoint", "records", "measured")


def _digest(value: dict[str, Any]) -> str:
    return text_digest(json.dumps(value, sort_keys=True))


@dataclass(frozen=True)
class Record:
    """A file of the growing checkpoint and where it is written what the file held when it was finished.

    job: digest of the job;  file: what was made;  path: of its record
    """

    job: str
    file: Path
    path: Path

    def write(self, digest: str | None, **described: Any) -> None:
        """Says that the file is finished. digest: of its contents, None where there was nothing to write"""
        said = {"job": self.job, "digest": digest, **described}
        write_json({**said, _SEAL: _digest(said)}, self.path)

    def read(self) -> dict[str, Any] | None:
        """What was said, if the file still holds what it did; None where it is to be made (again), with a warning
        where something was there."""
        if not self.path.is_file():
            return None
        try:
            record = read_json(self.path)
        except ValueError as error:
            _log.warning("%s; what it tells of is made again", error)
            return None
        if record.pop(_SEAL, None) != _digest(record):
            _log.warning("%s: does not hold what was written to it; what it tells of is made again", self.path)
            return None
        if record["job"] != self.job:
            _log.warning("%s: is of another job; what it tells of is made again", self.path)
            return None
        if record["digest"] is None:
            return record
        if not self.file.is_file() or file_digest(self.file) != record["digest"]:
            _log.warning("%s: does not hold what was written to it; it is made again", self.file)
            return None
        return record


@dataclass(frozen=True)
class Unfinished:
    """``.<out>.unfinished`` and the job that is done there."""

    folder: Path
    job: dict[str, Any]

    @cached_property
    def key(self) -> str:
        return _digest(self.job)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def measured(self) -> Path:
        return self.folder / "measured"

    def record(self, name: str) -> Record:
        """Of the file of a layer, by its name in the growing checkpoint."""
        return Record(self.key, self.checkpoint / name, self.folder / "records" / f"{name}.json")

    def carried(self, name: str) -> Record:
        """Of the file with what is carried over of a shard; another than a layer's even where the names are one."""
        return Record(self.key, self.checkpoint / name, self.folder / "records" / f"carried-{name}.json")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder: made, or found again if it is this very job's.

        Removed at the end, and where an error of the input comes before a first layer is finished: a finished layer is
        removed by nobody but the user, whatever goes wrong.
        Raises ValueError if it is another job's, or another process works there.
        """
        described = self.folder / _JOB
        if self.folder.exists() and not described.is_file() and not self._is_empty():
            raise ValueError(f"{self.folder}: the work is done there, and it holds something else; move it away")
        self.folder.mkdir(exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(FileLock(self.folder / _LOCK).acquire(blocking=False))
            except Timeout:
                raise ValueError(f"{self.folder}: another process is compressing into it; wait for it to end") from None
            self._begin(described)
            try:
                yield
            except ValueError:
                if self._holds_work():
                    _log.warning("%s: keeps what is finished; the same call goes on from there", self.folder)
                else:
                    self.remove()
                raise
            self.remove()

    def _begin(self, described: Path) -> None:
        if not described.is_file():
            write_json(self.job, described)
        else:
            try:
                same = read_json(described) == self.job
            except ValueError as error:
                if same := self._is_of_this_job(error):
                    write_json(self.job, described)
            if not same:
                raise ValueError(
                    f"{self.folder}: holds an unfinished job with other settings or another model; "
                    "run that command again to finish it, or remove the folder"
                )
        for name in _FOLDERS[:2]:
            (self.folder / name).mkdir(exist_ok=True)
        sync_folder(self.folder)

    def _is_of_this_job(self, error: ValueError) -> bool:
        """Where job.json cannot be read: whether the records, each of which names its job, speak for another."""
        jobs = set()
        for path in (self.folder / "records").glob("*.json"):
            with suppress(ValueError):
                jobs.add(read_json(path).get("job"))
        if jobs <= {self.key}:
            _log.warning("%s; of the work beside it, what says that it is of this job is used", error)
            if self.measured.is_dir():  # which does not say
                shutil.rmtree(self.measured)
            return True
        return False

    def _is_empty(self) -> bool:
        """Whether it holds nothing but what is there before job.json comes or after it goes."""
        found = {self.folder / _LOCK, part_name(self.folder / _JOB)}
        return self.folder.is_dir() and set(self.folder.iterdir()) <= found

    def _holds_work(self) -> bool:
        """Whether a layer is finished or measured."""
        if self.measured.is_dir() and any(self.measured.iterdir()):
            return True
        for path in (self.folder / "records").glob("*.json"):
            with suppress(ValueError):
                if "path" in read_json(path):
                    return True
        return False

    def remove(self) -> None:
        """In an order in which, killed anywhere, what is left says whose it is."""
        for name in _FOLDERS:
            if (self.folder / name).is_dir():
                shutil.rmtree(self.folder / name)
        sync_folder(self.folder)
        for path in (self.folder / _JOB, part_name(self.folder / _JOB), self.folder / _LOCK):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a process that came for the lock just now; it removes the folder in turn
            self.folder.rmdir()
