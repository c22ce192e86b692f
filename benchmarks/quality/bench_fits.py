"""Fits under moments judged by KL from the dense model, in the domain of the calibration and out of it.

    python benchmarks/quality/bench_fits.py MODEL --text heldout.txt --other wikitext2-test.txt --csv FILE

Calibrated on the even windows of 256 tokens of --text; judged on 12,000 tokens of its odd windows ("in") and 8,000 of
--other ("out"). Every row is a method's own tensors, decoded into the dense model, whose float32 arithmetic all share.
Rows: the method fit at each size, and the very forms it chose filled without data; the plain quantiser, every weight in
2, 3 or 4 bits, by scale search alone and by error feedback; and with --ridges the regulariser at the first size.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from resmoe_kernels.factored import MATRICES
from resmoe_kernels.payload import Payload, decode, encode
from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.calibration.statistics import Statistics
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.tools.divergence import Divergence
from resmoe_kernels.python_ops.tools.evaluate import encode as tokens_of

WINDOW = 256
IN, OUT = 12_000, 8_000  # tokens judged
BATCH = 8  # windows


class Judge:
    """A dense model's logits of both texts, and how far a model with other experts is from them."""

    def __init__(self, model: Any, texts: dict[str, Tensor]) -> None:
        self.model, self.texts = model, texts
        self.reference = {name: list(self._logits(windows)) for name, windows in texts.items()}

    @torch.inference_mode()
    def _logits(self, windows: Tensor):
        for batch in windows.split(BATCH):
            yield self.model(batch, use_cache=False).logits.flatten(0, 1)

    @torch.inference_mode()
    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, windows in self.texts.items():
            divergence, nll = Divergence(), 0.0
            parts = zip(windows.split(BATCH), self._logits(windows), self.reference[name], strict=True)
            for batch, logits, reference in parts:
                divergence.add(logits, reference)
                predicted = logits.view(*batch.shape, -1)[:, :-1].flatten(0, 1)
                nll += float(torch.nn.functional.cross_entropy(predicted, batch[:, 1:].flatten(), reduction="sum"))
            found |= {f"{metric}_{name}": value for metric, value in divergence.metrics().items()}
            found[f"perplexity_{name}"] = float(torch.tensor(nll / (len(windows) * (WINDOW - 1))).exp())
        return found


class Bench:
    def __init__(self, folder: Path, text: Path, other: Path, file: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name = folder.resolve().name
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.dense = DenseModel(self.model)
        own, foreign = (_windows(tokenizer, path) for path in (text, other))
        self.statistics = collect(self.dense, own[0::2], moments="experts", progress=False)
        texts = {"in": own[1::2][: -(-IN // WINDOW)], "out": foreign[: -(-OUT // WINDOW)]}
        self.judge = Judge(self.model, texts)
        self.experts = [self.dense.read(i) for i in range(len(self.dense.experts))]
        self.kept = [{m: getattr(e, m).clone() for m in MATRICES} for e in self.experts]
        self.weights = sum(t.numel() for kept in self.kept for t in kept.values())
        self.known: dict[tuple[float, int], dict[str, Tensor]] = {}
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)

    def row(self, form: str, data: str, weights: list[dict[str, Tensor]], nbytes: int, began: float, **more) -> None:
        self._put(weights)
        judged = self.judge.metrics()
        self._put(self.kept)
        bits = 8 * nbytes / self.weights
        described = {"model": self.name, "form": form, "data": data, **more}
        sizes = {"bits_per_weight": f"{bits:.3f}", "bytes": f"{bits / 16:.4f}"}
        metrics = {name: f"{value:.5g}" for name, value in judged.items()}
        row = {**described, **sizes, **metrics, "seconds": f"{time.time() - began:.0f}"}
        tqdm.write(str(row))
        new = not self.file.exists()
        with self.file.open("a", newline="") as file:  # row by row: each takes a while
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _put(self, weights: list[dict[str, Tensor]]) -> None:
        for i, of_layer in enumerate(weights):
            module = self.dense.experts[i].module
            module.gate_up_proj.data.copy_(of_layer["gate_up"])  # type: ignore[union-attr, operator]
            module.down_proj.data.copy_(of_layer["down"])  # type: ignore[union-attr, operator]

    def _measured(self, method: Any, i: int) -> dict[str, Tensor]:
        """What a size is planned by does not depend on it: measured once for each ridge."""
        key = (method.settings["ridge"], i)
        if key not in self.known:
            of_layer = self.statistics.layers[self.dense.experts[i].path]
            self.known[key] = method.measure(self.experts[i], plan={}, statistics=of_layer)
        return self.known[key]

    def made(
        self, statistics: Statistics | None, plans: list[dict[str, Any]] | None = None, **settings: Any
    ) -> tuple[list[dict[str, Tensor]], int, list[dict[str, Any]]]:
        """What the method fit makes: its weights decoded, its bytes, its plans."""
        method = method_named("fit", settings)
        numbers = list(range(len(self.experts)))
        if plans is None:
            measured = [self._measured(method, i) for i in numbers]
            plans = method.plan(self.dense, numbers, statistics, False, lambda _: measured)
        weights, nbytes = [], 0
        for i, plan in zip(numbers, plans, strict=True):
            of_layer = None if statistics is None else statistics.layers[self.dense.experts[i].path]
            made = method(self.experts[i], plan=plan, statistics=of_layer)
            dense = made.weights.materialize()
            weights.append({m: getattr(dense, m) for m in MATRICES})
            nbytes += made.weights.nbytes()
        return weights, nbytes, plans

    def sizes(self, sizes: list[float]) -> None:
        planned = []
        for size in sizes:
            began = time.time()
            weights, nbytes, plans = self.made(self.statistics, bits_per_weight=16 * size)
            self.row(f"fit {size:g}: {_forms(plans)}", "even windows", weights, nbytes, began)
            planned.append((size, plans))
        for size, plans in planned:
            began = time.time()
            weights, nbytes, _ = self.made(None, plans, bits_per_weight=16 * size)
            self.row(f"the same form of {size:g}", "none", weights, nbytes, began)

    def ridges(self, size: float, ridges: list[float]) -> None:
        for ridge in ridges:
            began = time.time()
            weights, nbytes, _ = self.made(self.statistics, bits_per_weight=16 * size, ridge=ridge)
            self.row(f"fit {size:g}, ridge {ridge:g}", "even windows", weights, nbytes, began)

    def quantised(self, bits: int) -> None:
        began, payload = time.time(), Payload(bits, 128)
        rounded = [{m: decode(*encode(t, payload), payload, t.shape[-1]) for m, t in k.items()} for k in self.kept]
        nbytes = sum(payload.nbytes(tuple(t.shape)) for kept in self.kept for t in kept.values())
        self.row(f"every weight in {bits} bits, scale search", "none", rounded, nbytes, began)
        form = {"base": None, "values": str(payload), "ranks": []}
        plans = [{"base": False, **{m: form for m in MATRICES}} for _ in self.kept]
        for data, statistics in (("none", None), ("even windows", self.statistics)):
            began = time.time()
            weights, nbytes, _ = self.made(statistics, plans, size=1.0)
            how = "unbiased" if statistics is None else "error feedback, unbiased"
            self.row(f"every weight in {bits} bits, {how}", data, weights, nbytes, began)


def _windows(tokenizer: Any, path: Path) -> Tensor:
    ids = torch.tensor(tokens_of(tokenizer, path.read_text(encoding="utf-8")))
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def _forms(plans: list[dict[str, Any]]) -> str:
    """How many matrices have each form."""
    counts: dict[str, int] = {}
    for plan in plans:
        for matrix in MATRICES:
            form = plan[matrix]
            name = f"{matrix} {form['values'] or 'low rank'}" + (f" on base {form['base']}" if form["base"] else "")
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{n} x {form}" for form, n in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="text of another domain")
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.065, 0.1, 0.165], help="shares of bfloat16 bytes")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--ridges", type=float, nargs="*", default=[])
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments.model, arguments.text, arguments.other, arguments.csv)
    bench.sizes(arguments.sizes)
    if arguments.sizes:
        bench.ridges(arguments.sizes[0], arguments.ridges)
    for bits in arguments.bits:
        bench.quantised(bits)


if __name__ == "__main__":
    main()
