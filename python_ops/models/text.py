"""A text as tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase


def read_text(path: Path | str) -> str:
    """Raises ValueError, naming the file, where it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text, byte {error.start} is not") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Its token ids, nothing added."""
    # Not verbose: the tokenizer would warn of a text longer than the model, which is what windows are for.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
