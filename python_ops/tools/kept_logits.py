"""A model's logits of a text on disk, so that another can be held against them when both do not fit in memory.

They are kept in the dtype in which the head gave them: the very bits, so that nothing of the distribution is lost. A
token takes V entries, 2 bytes each in bfloat16: 12,000 tokens of a vocabulary of 128,000 are 3.1 GB.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmoe_kernels.python_ops.storage.files import give_name, part_name

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def described(token_ids: Tensor, stride: int, window: int) -> dict[str, str]:
    """What tells the windows of one evaluation from those of another. token_ids: (n,) int64."""
    digest = hashlib.sha256(token_ids.cpu().numpy().tobytes()).hexdigest()
    return {"tokens": digest, "stride": str(stride), "window": str(window)}


class LogitsWriter:
    """Writes a safetensors file with the tensor ``logits`` (n, V), some tokens at a time.

    The file appears under its name only once it is whole. Raises ValueError for logits of a dtype not known.
    """

    def __init__(self, path: Path | str, tokens: int, windows: dict[str, str]) -> None:
        self.path, self.tokens, self.windows = Path(path), tokens, windows
        self._part = part_name(self.path)
        self._file: Any = None
        self._written = 0

    def add(self, logits: Tensor) -> None:
        """logits: (n, V), of the next n tokens"""
        if self._file is None:
            self._file = self._part.open("wb")
            self._file.write(self._header(logits))
        self._file.write(logits.contiguous().cpu().view(torch.uint8).numpy().data)
        self._written += len(logits)

    def _header(self, logits: Tensor) -> bytes:
        if logits.dtype not in _DTYPES:
            raise ValueError(f"keep: logits must be {', '.join(map(str, _DTYPES))}, got {logits.dtype}")
        size = self.tokens * logits.shape[1] * logits.element_size()
        of_tensor = {
            "dtype": _DTYPES[logits.dtype],
            "shape": [self.tokens, logits.shape[1]],
            "data_offsets": [0, size],
        }
        header = json.dumps({"__metadata__": self.windows, "logits": of_tensor}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header

    def close(self, whole: bool = True) -> None:
        """Gives the file its name; removes what there is of it where it is not ``whole``."""
        if self._file is not None:
            self._file.close()
        if whole:
            assert self._written == self.tokens
            give_name(self._part, self.path)
        else:
            self._part.unlink(missing_ok=True)


class KeptLogits:
    """Reads them again, some tokens at a time, from a mapping of the file.

    Raises ValueError naming the file if it holds none, or those of other tokens, another stride or another window.
    """

    def __init__(self, path: Path | str, windows: dict[str, str]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._opened = safe_open(str(path), framework="pt")
            self._logits = self._opened.get_slice("logits")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: holds no kept logits ({error}); keep them with keep=") from None
        kept = self._opened.metadata() or {}
        if differing := [name for name, value in windows.items() if kept.get(name) != value]:
            raise ValueError(f"{path}: was kept of other {differing[0]} than are evaluated now; keep it again")

    def rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, V), of the tokens start ... stop - 1 of those scored."""
        return self._logits[start:stop]
