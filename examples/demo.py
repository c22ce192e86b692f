"""The main job on the bundled model: compress it three ways, load each result, measure it beside the dense model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.cli import continuation
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import expert_nbytes

HERE = Path(__file__).resolve().parent
DENSE = HERE / "tiny-mixtral"
RETAIN = 0.25
PROMPT = "The president of the United States"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=HERE / "wikitext2-excerpt.txt", help="text for the perplexity")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo-out", help="where the compressed models go")
    parser.add_argument("--quick", action="store_true", help="score only the first 2,048 tokens")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    folders = {"dense": DENSE}
    for residual, bits in (("lowrank", 16), ("lowrank", 4), ("sparse", 16)):
        name = f"{residual} {RETAIN:g}" + (f", {bits} bits" if bits < 16 else "")
        folders[name] = arguments.out / f"tiny-mixtral-{residual}-{bits}"
        command = f"resmoe compress {DENSE} {folders[name]} --residual {residual} --retain {RETAIN:g} --bits {bits}"
        print(f"\n{name}: {command}")
        rk.compress(DENSE, folders[name], method="resmoe", residual=residual, retain=RETAIN, bits=bits)

    table = Table(
        "", "expert bytes", "of dense", "bits per weight", "KL from dense", "perplexity", "tokens/s", "experts run on"
    )
    dense = AutoModelForCausalLM.from_pretrained(DENSE).eval()
    sizes, continuations = {}, {}
    for name, folder in folders.items():
        print(f"\n{name}: {folder}")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        limit = 2048 if arguments.quick else None
        result = rk.evaluate(model, tokenizer, text=arguments.text, stride=256, limit=limit, against=dense)
        sizes[name] = expert_nbytes(model)
        table.add_row(
            name,
            f"{sizes[name]:,}",
            f"{sizes[name] / sizes['dense']:.3f}",
            f"{16 * sizes[name] / sizes['dense']:.2f}",
            f"{result['kl']:.4f}",
            f"{result['perplexity']:.2f}",
            f"{result['tokens_per_second']:,.0f}",
            backend_of(model),
        )
        continuations[name] = continuation(model, tokenizer, PROMPT, 24)

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print()
    console.print(table)
    console.print("Bytes count everything stored: the shared base, the residuals, their indices and scales.")
    for name, text in continuations.items():
        console.print(f"[bold]{name}[/bold]: {PROMPT} … {escape(repr(text.strip()))}", highlight=False)
    console.print(f"The compressed models are in {arguments.out}", soft_wrap=True)


def backend_of(model: nn.Module) -> str:
    """What runs the experts, as the first factored layer explains it."""
    layer = next((m for m in model.modules() if isinstance(m, FactoredExpertsLayer)), None)
    return "transformers" if layer is None else layer.explain().splitlines()[0].partition(": ")[2]


if __name__ == "__main__":
    main()
