"""A compressed checkpoint has the same bytes with any number of threads, with a library that depends on it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import resmoe_kernels as rk
from tests.threaded_library import threads

SETTINGS = {
    "low rank": {"method": "resmoe", "residual": "lowrank"},
    "sparse": {"method": "resmoe", "residual": "sparse"},
    "mc-smoe": {"method": "mc-smoe", "groups": 4, "similarity": "outputs"},
    "moe-i2": {"method": "moe-i2", "prune": 0.25},
    "xmoe": {"method": "xmoe", "parts": 2, "experts_per_token": 1.5},
}


@pytest.fixture(scope="module")
def statistics(repo, tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "out"
    rk.compress(
        repo / "examples" / "tiny-mixtral", out, method="mc-smoe", stage="merge", groups=4, progress=False,
        calibration=repo / "examples" / "wikitext2-excerpt.txt", calibration_tokens=512,
    )  # fmt: skip
    return next(out.parent.glob("*.statistics.safetensors"))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_has_the_same_bytes(name, repo, statistics, tmp_path):
    for count in (1, 3):
        with threads(count):
            rk.compress(
                repo / "examples" / "tiny-mixtral", tmp_path / str(count), progress=False,
                **SETTINGS[name], **({} if name in ("low rank", "sparse") else {"calibration": statistics}),
            )  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "3").iterdir())
    for file in files:
        one, other = ((tmp_path / count / file) for count in ("1", "3"))
        if file.endswith(".safetensors"):
            ours, theirs = load_file(one), load_file(other)
            assert ours.keys() == theirs.keys()
            assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == [], file
        assert one.read_bytes() == other.read_bytes(), file
