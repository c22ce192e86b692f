"""What a compression job is calibrated on: nothing, statistics from a file, or a text, whose statistics are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from resmoe_kernels.python_ops.calibration.calibrate import DEFAULT_TOKENS, check_moments, collect, origin_of, windows
from resmoe_kernels.python_ops.calibration.statistics import MOMENTS, Statistics
from resmoe_kernels.python_ops.methods.method import Chain, Method
from resmoe_kernels.python_ops.models.dense_model import DenseModel

_log = logging.getLogger("resmoe_kernels")


@dataclass(frozen=True)
class CalibrationData:
    """Where a method's statistics come from; ``described`` is what a job is told apart by."""

    described: dict[str, Any]
    loaded: Statistics | None = None
    token_ids: Tensor | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    file: str = ""

    def statistics(self, model: DenseModel, folder: Path, progress: bool) -> Statistics | None:
        """Those of the file named; or those of the text, kept in ``folder``, where they are collected once."""
        if self.token_ids is None:
            return self.loaded
        kept = folder / self.file
        if kept.is_file():
            _log.info("calibration: %s is there already and used again", kept)
            return Statistics.load(kept)
        made = collect(
            model,
            self.token_ids,
            moments=self.origin["moments"],
            fingerprint=self.origin["model"],
            file=kept,
            progress=progress,
        )
        made.save(kept)
        return made


def calibration_data(
    method: Method | Chain,
    model: Path,
    fingerprint: str,
    calibration: str | os.PathLike[str] | None,
    tokens: int | None,
    moments: str | None,
    trust_remote_code: bool,
) -> CalibrationData:
    """What ``compress`` was given, read and checked before any work.

    model: its folder;  calibration, tokens, moments: see compress
    Raises ValueError where the method needs calibration and there is none or the other way round, for a text that
    cannot be read or is too short, and for statistics of another model.
    """
    given = [n for n, v in (("calibration", calibration), ("calibration_tokens", tokens), ("moments", moments)) if v]
    if not method.needs_statistics and not (method.fits and calibration is not None):
        if given:
            raise ValueError(f"{given[0]}: {method.name} uses no calibration with these settings; leave it out")
        return CalibrationData({})
    if calibration is None:
        raise ValueError(f"calibration: {method.name} needs a text to see how the experts are used; name a UTF-8 file")
    if Path(calibration).suffix == ".safetensors":
        if len(given) > 1:
            raise ValueError(f"{given[1]}: {calibration} holds statistics collected before; leave it out")
        loaded = Statistics.load(calibration)
        if loaded.origin["model"] != fingerprint:
            raise ValueError(f"{calibration}: was collected from another model than {model}; calibrate again")
        if method.fits and loaded.origin["moments"] != "experts" and not method.needs_statistics:
            raise ValueError(
                f"{calibration}: holds {loaded.origin['moments']} moments, {method.name} fits under those of "
                "'experts'; calibrate again with moments='experts'"
            )
        return CalibrationData({"calibration": loaded.origin}, loaded)
    from transformers import AutoConfig, AutoTokenizer

    moments = moments or ("experts" if method.fits else MOMENTS[0])
    check_moments(moments)
    if method.fits and moments != "experts" and not method.needs_statistics:
        raise ValueError(f"moments: {method.name} fits under those of 'experts', got {moments!r}; leave it out")
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    token_ids = windows(config, tokenizer, calibration, tokens or DEFAULT_TOKENS)
    origin = origin_of(token_ids, fingerprint, moments)
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    file = f"{model.resolve().name}-{digest}.statistics.safetensors"
    return CalibrationData({"calibration": origin}, None, token_ids, origin, file)
