"""What is published keeps its name: the Python names and their arguments, the command line, methods and their settings.

A name that comes is written down here; one that goes, or changes, is a decision and not an accident.
"""

from __future__ import annotations

import inspect

import pytest
import typer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.cli import app
from resmoe_kernels.python_ops.methods.named import setting_defaults

PUBLIC = {
    "FactoredExperts": None,  # classes: their tensors are the weight form's
    "DenseExperts": None,
    "PackedExperts": None,
    "experts": "x top_k_index top_k_weights weights activation",
    "backend": "name",
    "backends": "",
    "explain": "weights activation",
    "compress": "model out method layers calibration calibration_tokens moments trust_remote_code workers engine"
    " progress settings",
    "swap_experts": "model method layers statistics progress settings",
    "evaluate": "model tokenizer text lambada piqa piqa_labels stride window limit against keep progress",
    "calibrate": "model tokenizer text tokens moments progress",
}
COMMANDS = {
    "compress": "model out --method --layers --calibration --calibration-tokens --moments --workers --engine"
    " --trust-remote-code",
    "requantise": "model out --bits --base-bits --residual-bits --group",
    "settings": "method",
    "diagnose": "model --layers --budget --plot --json --trust-remote-code",
    "inspect": "out --json",
    "eval": "models --text --lambada --piqa --stride --limit --json --trust-remote-code",
    "generate": "out --prompt --max-new-tokens --trust-remote-code",
    "env": "",
}
STORAGE = " bits base_bits residual_bits group"
SETTINGS = {
    "quantise": "",
    "resmoe": "residual retain factorization sparse_layout budget init solver",
    "mc-smoe": "stage groups budget similarity align retain density sparse_layout",
    "moe-i2": "prune retain alpha allocation search population generations candidates block masked seed",
    "xmoe": "threshold experts_per_token combine max_experts parts split part_router part_mass parts_per_token",
}


def test_every_public_name_is_listed():
    assert {*PUBLIC, "__version__"} <= set(rk.__all__)


@pytest.mark.parametrize("name", [name for name, arguments in PUBLIC.items() if arguments is not None])
def test_public_functions_take_what_they_took(name):
    assert set(PUBLIC[name].split()) <= set(inspect.signature(getattr(rk, name)).parameters)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_what_they_took(name):
    command = typer.main.get_command(app).commands[name]
    taken = {parameter.opts[-1] for parameter in command.params}
    assert set(COMMANDS[name].split()) <= taken


@pytest.mark.parametrize("method", SETTINGS)
def test_methods_can_be_told_what_they_could(method):
    assert set((SETTINGS[method] + STORAGE).split()) <= set(setting_defaults(method))
