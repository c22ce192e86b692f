"""The command line: ``resmoe diagnose | compress | inspect | eval | generate | env``, each a call of one function."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmoe_kernels.python_ops.terminal import printable, told_in_a_sentence

app = typer.Typer(
    help="Compress Mixture-of-Experts checkpoints and run them compressed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code a checkpoint brings along.")]


@app.command(
    "compress",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Settings of the method follow as --name value, e.g. --retain 0.25; 'resmoe settings METHOD' lists them.",
)
def compress_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder of the dense checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    method: Annotated[
        str | None, typer.Option(help="resmoe, mc-smoe, moe-i2, xmoe, quantise, xmoe+ another; with --size fit")
    ] = None,
    layers: Annotated[str, typer.Option(help="all, first:N, last:N, or numbers like 0,3,5-7")] = "all",
    calibration: Annotated[Path | None, typer.Option(help="Text, or statistics collected before.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Of the text; 65,536 if not given.")] = None,
    moments: Annotated[str | None, typer.Option(help="Of calibration: diagonal, full, or experts, for fits.")] = None,
    workers: Annotated[int, typer.Option(help="Layers compressed at a time.")] = 1,
    engine: Annotated[str, typer.Option(help="processes of this machine, or tasks of a ray cluster.")] = "processes",
    trust_remote_code: Remote = False,
) -> None:
    """Compress the experts of MODEL into OUT. Interrupted, the same command goes on where it stopped.

    With --size 0.1 (a share of the dense experts), --size 6GiB or --bits-per-weight 1.5, and no method, the method is
    fit, which chooses the form of every layer and matrix, with --calibration FILE for what the experts see there.
    """
    from resmoe_kernels.python_ops.jobs.compress import compress

    method = method or method_for(context.args)
    compress(
        model,
        out,
        method=method,
        layers=layers,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        moments=moments,
        workers=workers,
        engine=engine,
        trust_remote_code=trust_remote_code,
        **method_settings(method, context.args),
    )
    _print_inspection(inspect_checkpoint(out))


@app.command("requantise")
def requantise_command(
    model: Annotated[Path, typer.Argument(metavar="IN", help="Folder of a factored checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    bits: Annotated[int | None, typer.Option(help="8, 4, 3 or 2, of every tensor.")] = None,
    base_bits: Annotated[int | None, typer.Option(help="In its place, of the bases.")] = None,
    residual_bits: Annotated[int | None, typer.Option(help="In its place, of the residuals.")] = None,
    group: Annotated[int, typer.Option(help="Columns to a scale: 32, 64 or 128.")] = 128,
) -> None:
    """Store the layers of IN in fewer bits in OUT, without the dense model. The same command goes on after a crash."""
    from resmoe_kernels.python_ops.jobs.requantise import requantise

    requantise(model, out, bits=bits, base_bits=base_bits, residual_bits=residual_bits, group=group)
    _print_inspection(inspect_checkpoint(out))


@app.command("settings")
def settings_command(
    method: Annotated[str, typer.Argument(help="resmoe, mc-smoe, moe-i2, xmoe, quantise, fit")],
) -> None:
    """List the settings of a method: their types and defaults."""
    from resmoe_kernels.python_ops.methods.named import setting_defaults, setting_types

    table = Table("setting", "type", "default")
    for (name, kinds), default in zip(setting_types(method).items(), setting_defaults(method).values(), strict=True):
        words = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        table.add_row(_flag(name), words, str(default).lower() if default is None else str(default))
    _print(table)


def method_for(words: list[str]) -> str:
    """The method where none is named: the one that a size asks for, or resmoe."""
    by_size = {_flag(name) for name in ("size", "bits_per_weight")}
    return "fit" if by_size & {word.partition("=")[0] for word in words} else "resmoe"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def method_settings(method: str, words: list[str]) -> dict[str, Any]:
    """``["--retain", "0.25"]`` -> ``{"retain": 0.25}``, each value in the type that the method's setting has.

    Raises ValueError for a name the method does not know, a value of another type, and a word that is neither.
    """
    from resmoe_kernels.python_ops.methods.named import setting_types

    types, settings, rest = setting_types(method), {}, list(words)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--"):
            raise ValueError(f"compress: got the word {option!r}, expected --name value")
        if name not in types:
            raise ValueError(f"{option}: not a setting of {method}; known are {', '.join(map(_flag, types))}")
        if not equals:
            if not rest:
                raise ValueError(f"{option}: needs a value")
            value = rest.pop(0)
        settings[name] = _parsed(option, value, types[name])
    return settings


def _parsed(option: str, value: str, kinds: tuple[type, ...]) -> Any:
    words: dict[str, Any] = {"true": True, "false": False} if bool in kinds else {}
    if type(None) in kinds:
        words["none"] = None
    if value.lower() in words:
        return words[value.lower()]
    for kind in kinds:
        if kind in (int, float, str):
            with suppress(ValueError):
                return kind(value)
    wanted = " or ".join([k.__name__ for k in kinds if k in (int, float, str)] + list(words))
    raise ValueError(f"{option}: must be {wanted}, got {value!r}")


@app.command("diagnose")
def diagnose_command(
    model: Annotated[Path, typer.Argument(help="Folder of the dense checkpoint.")],
    layers: Annotated[str, typer.Option(help="all, first:N, last:N, or numbers like 0,3,5-7")] = "all",
    budget: Annotated[
        str, typer.Option(help="Parts of the dense bytes at which forms are compared.")
    ] = "0.25,0.375,0.5",
    plot: Annotated[Path | None, typer.Option(help="Picture to make, such as out.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """Say before compressing whether a shared base pays for MODEL, and what error each form leaves.

    Beside the forms that compress makes, int8 and int4 are the dense experts rounded to nearest, for comparison.
    """
    from dataclasses import asdict

    from resmoe_kernels.python_ops.tools.diagnose import diagnose, verdict
    from resmoe_kernels.python_ops.tools.diagnose_plot import check_plot
    from resmoe_kernels.python_ops.tools.diagnose_plot import plot as draw

    if plot is not None:
        check_plot(plot)
    diagnoses = diagnose(model, layers=layers, budgets=_budgets(budget), trust_remote_code=trust_remote_code)
    if plot is not None:
        draw(diagnoses, plot, model.resolve().name)
    if as_json:
        print(json.dumps({"verdict": verdict(diagnoses), "layers": [asdict(d) for d in diagnoses]}, indent=2))
    else:
        _print_diagnosis(diagnoses)
        print("\n".join(verdict(diagnoses)))


def _budgets(words: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"budget: must be numbers like 0.25,0.375, got {words!r}") from None


def _print_diagnosis(layers: list) -> None:
    from resmoe_kernels.factored import MATRICES
    from resmoe_kernels.python_ops.solvers.spectra import QUARTER
    from resmoe_kernels.python_ops.tools.diagnose import model_errors

    quarter = [f"1/4 rank of {m}: weight, residual, random" for m in MATRICES]
    table = Table("layer", "measured", "cosine before", "after alignment", "energy of residual", *quarter)
    for d in layers:
        kept = [", ".join(f"{curve[QUARTER]:.3f}" for curve in d.spectra[m].values()) for m in MATRICES]
        cosines = [f"{c:.4f}" for c in (d.cosine_before, d.cosine_after, d.residual_energy)]
        table.add_row(_name(d.path), f"{len(d.measured)} of {d.num_experts} experts", *cosines, *kept)
    _print(table)
    totals = {(t.form, t.budget): t for t in model_errors(layers)}
    for budget in dict.fromkeys(e.budget for e in layers[0].errors if e.budget is not None):
        forms = [(e.form, e.budget) for e in layers[0].errors if e.budget in (budget, None)]
        table = Table(f"relative error at {budget:g} of the bytes", *(form for form, _ in forms))
        for d in layers:
            error = {(e.form, e.budget): e.relative_error for e in d.errors}
            table.add_row(_name(d.path), *("-" if error[f] is None else f"{error[f]:.4f}" for f in forms))
        table.add_row("all", *(f"{totals[f].error:.4f}" if f in totals else "-" for f in forms), style="bold")
        table.add_row("bytes / dense", *(f"{totals[f].size:.4f}" if f in totals else "-" for f in forms))
        _print(table)


@app.command("inspect")
def inspect_command(
    out: Annotated[Path, typer.Argument(help="Folder of a factored checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each layer of a factored checkpoint holds, its bytes and its error."""
    rows = inspect_checkpoint(out)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_inspection(rows)


@app.command("eval")
def eval_command(
    models: Annotated[list[Path], typer.Argument(help="Folders of checkpoints, dense or factored.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text: perplexity, KL from the first model.")] = None,
    lambada: Annotated[Path | None, typer.Option(help="LAMBADA-style JSONL: accuracy of the last word.")] = None,
    piqa: Annotated[Path | None, typer.Option(help="PIQA-style JSONL, labels beside it: two-choice accuracy.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens scored per window; 512, or the window if less.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many tokens of text, or rows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """Evaluate checkpoints side by side: bytes of the experts, perplexity, KL from the first, accuracies.

    With a text and more than one checkpoint, the first, the dense one, is what the others are held against: its logits
    of the text are kept in a temporary file (TMPDIR), exactly, so that one model at a time is in memory.
    """
    from resmoe_kernels.python_ops.models.layouts import expert_nbytes
    from resmoe_kernels.python_ops.tools.evaluate import evaluate

    rows: dict[str, dict[str, float]] = {}
    files = {"text": text, "lambada": lambada, "piqa": piqa}
    with TemporaryDirectory() as folder_of_logits:
        logits = Path(folder_of_logits) / "logits.safetensors" if text is not None and len(models) > 1 else None
        for folder in models:
            model, tokenizer = _load(folder, trust_remote_code)
            first = not rows
            judged = {"keep": logits if first else None, "against": None if first else logits}
            results = evaluate(model, tokenizer, **files, **judged, stride=stride, limit=limit)
            rows[str(folder)] = {"expert_bytes": expert_nbytes(model), **results}
            del model
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("", *map(_name, rows))
    for metric in dict.fromkeys(metric for row in rows.values() for metric in row):
        table.add_row(metric, *(_number(row[metric]) if metric in row else "-" for row in rows.values()))
    _print(table)


@app.command("generate")
def generate_command(
    out: Annotated[Path, typer.Argument(help="Folder of a checkpoint, dense or factored.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 64,
    trust_remote_code: Remote = False,
) -> None:
    """Continue a prompt, greedily."""
    model, tokenizer = _load(out, trust_remote_code)
    print(continuation(model, tokenizer, prompt, max_new_tokens))


@app.command("env")
def env_command() -> None:
    """Show versions, what was built, GPUs, and the backends with the reason why one is missing."""
    from resmoe_kernels.python_ops.tools.environment import aligned, environment

    print(aligned(environment()))


def inspect_checkpoint(folder: str | Path) -> list[dict[str, Any]]:
    """One row per compressed layer: path, form, ranks, density, the share of each matrix's parameters that is kept
    beside the base, bytes dense and now, error at compression, and what differs in its router.

    Read from config.json. Raises ValueError if the folder is not a whole factored checkpoint.
    """
    from resmoe_kernels.python_ops.models.checkpoint import Checkpoint
    from resmoe_kernels.python_ops.models.hf_quantizer import QUANT_METHOD, ResMoEConfig, check_complete

    checkpoint = Checkpoint(folder)
    stored = checkpoint.config.get("quantization_config") or {}
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{folder}: not a factored checkpoint (no quantization_config of method {QUANT_METHOD!r})")
    layers = ResMoEConfig(**stored).layers
    check_complete(layers, checkpoint.shard_of)
    return inspect_layers(layers)


def inspect_layers(specs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same of the layers that a config describes, by path."""
    return [_inspect_layer(path, spec) for path, spec in specs.items()]


def _inspect_layer(path: str, spec: dict[str, Any]) -> dict[str, Any]:
    from resmoe_kernels.factored import MATRICES
    from resmoe_kernels.python_ops.models.hf_quantizer import described_weights
    from resmoe_kernels.python_ops.models.routing import RouterChange

    weights = described_weights(spec)
    tensors = weights.tensors()
    dense_counts = {m: weights.num_experts * prod(weights.rows_columns(m)) for m in MATRICES}
    dense_count = sum(dense_counts.values())
    residual = {m: {stem: weights.count(f"{stem}_{m}") for stem in ("u", "v", "values")} for m in MATRICES}
    parts = []
    if weights.base_gate_up is not None:
        parts.append(f"base x{len(weights.base_gate_up)}")
    rank = {m: len(tensors[f"u_{m}"]) / weights.num_experts for m in MATRICES if f"u_{m}" in tensors}
    if rank:
        parts.append(f"low rank ({weights.factorization})")
    density = None
    if weights.mask_gate_up is not None:
        density = sum(of["values"] for of in residual.values()) / dense_count
        of_32 = dict.fromkeys(str(weights.block_kept(m)) for m in MATRICES)
        parts.append("bitmap" if weights.row_offsets_gate_up is not None else f"block {'/'.join(of_32)}:32")
    elif weights.values_gate_up is not None:
        parts.append("full residual" if weights.group is not None else "full")
    # The dense layer in the dtype of the factors, of codes in 16 bits; biases are the same in both.
    width = max((dtype.itemsize for dtype in weights.dtypes()), default=2)
    report = spec.get("report", {})
    return {
        "path": path,
        "form": " + ".join(parts),
        "payloads": weights.payloads,
        "mean_rank": rank or None,
        "density": density,
        "kept": {m: sum(residual[m].values()) / n for m, n in dense_counts.items()},
        "bytes_dense": dense_count * width + weights.nbytes_by_part()["bias"],
        "bytes_now": weights.nbytes(),
        "bits_per_weight": 8 * (weights.nbytes() - weights.nbytes_by_part()["bias"]) / dense_count,
        "relative_error": report.get("relative_error", float("nan")),
        "requantise_error": report.get("requantise_error"),
        "router": RouterChange.from_json(spec["router"]).describe() if "router" in spec else "",
    }


def _stored_as(payloads: str) -> str:
    """``base int4/128, u int4, v int4/128``: once where both matrices agree."""
    named: dict[str, dict[str, None]] = {}
    for word in payloads.split():
        name, _, payload = word.partition("=")
        stem = name.removesuffix("_gate_up").removesuffix("_down")
        named.setdefault(stem, {})[payload] = None
    return ", ".join(f"{stem} {' and '.join(found)}" for stem, found in named.items()) or "floats"


def _print_inspection(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "layer",
        "form",
        "stored as",
        "mean rank gate_up/down",
        "density",
        "kept of gate_up/down",
        "bytes dense",
        "now",
        "ratio",
        "bits/weight",
        "relative error",
        "router",
    )
    for row in rows:
        rank, density, again = row["mean_rank"], row["density"], row["requantise_error"]
        table.add_row(
            _name(row["path"]),
            row["form"],
            _stored_as(row["payloads"]),
            "-" if rank is None else "/".join(f"{r:g}" for r in rank.values()),
            "-" if density is None else f"{density:.3f}",
            "/".join(f"{share:.3f}" for share in row["kept"].values()),
            f"{row['bytes_dense']:,}",
            f"{row['bytes_now']:,}",
            f"{row['bytes_now'] / row['bytes_dense']:.3f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['relative_error']:.4f}" + ("" if again is None else f", then {again:.4f}"),
            row["router"],
        )
    dense, now = (sum(row[key] for row in rows) for key in ("bytes_dense", "bytes_now"))
    weights = sum(8 * row["bytes_now"] / row["bits_per_weight"] for row in rows)  # biases apart
    totals = (f"{dense:,}", f"{now:,}", f"{now / dense:.3f}", f"{8 * now / weights:.2f}")
    table.add_row("all", "", "", "", "", "", *totals, "", "", style="bold")
    _print(table)


def _print(table: Table) -> None:
    # At its own width: fitted to the 80 columns of a pipe or a narrow terminal, numbers lose their digits.
    width = Console(width=1000).measure(table).maximum
    Console(width=width).print(table)


def continuation(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of a prompt, without the prompt. Raises ValueError if the prompt holds no token."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].numel():
        raise ValueError(f"prompt: must hold at least one token, got {prompt!r}")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _load(folder: Path, trust_remote_code: bool):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from resmoe_kernels.python_ops.models.checkpoint import Checkpoint
    from resmoe_kernels.python_ops.models.dense_model import native_class

    checkpoint = Checkpoint(folder)  # says in one line what is missing or truncated
    try:
        loads = native_class(checkpoint.config, trust_remote_code) or AutoModelForCausalLM
        model = loads.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any type: what a model's class says to values and shapes it does not like
        raise ValueError(f"{folder}: transformers cannot load this model: {error or type(error).__name__}") from error


def _name(text: str) -> str:
    return escape(printable(text))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def main() -> None:
    """Entry point. What ends a command early is one line on stderr; see terminal.end_of for exit codes."""
    with told_in_a_sentence():
        app()
