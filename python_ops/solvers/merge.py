"""Merging: which experts of a layer become one, in which neuron order, and with which weights.

A layer's *dominant* experts found its groups; every other expert joins the one it is most like. Group g is that of
the g-th dominant expert, in ascending order of expert numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.products import product
from resmoe_kernels.python_ops.solvers.align import Progress, design_matrix, squared_norm
from resmoe_kernels.python_ops.solvers.assignment import assign

SIMILARITIES = ("router-logits", "weights", "outputs")


class Used(Protocol):
    """How a layer's E experts were used on calibration tokens.

    count: (E,) tokens of each;  probability: (E,) the router's, summed over tokens;  logit_gram: (E, E) inner products
    of the columns of its logits;  output: (E, H) sum of each expert's outputs
    """

    @property
    def count(self) -> Tensor: ...
    @property
    def probability(self) -> Tensor: ...
    @property
    def logit_gram(self) -> Tensor: ...
    @property
    def output(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Grouping:
    """What merging one layer of E experts into G needs to know.

    group: of every expert, in [0, G)
    weights: (E,) float64, those of one group sum to 1
    permutations: (E, I) int64, row i of expert e in its group's neuron order is row permutations[e, i] of its own
    """

    group: list[int]
    weights: Tensor
    permutations: Tensor

    @property
    def num_groups(self) -> int:
        return max(self.group) + 1

    def members(self, g: int) -> list[int]:
        return [e for e, own in enumerate(self.group) if own == g]


def dominant_experts(layers: Sequence[Used], total: int) -> list[list[int]]:
    """The ``total`` experts most used beside the best of their own layer, at least one of each layer.

        u_le = count_le / max_e count_le

    so that every layer's best has 1. Among equals the router's probability mass decides, compared in the same way,
    and after it lower layers and experts come first.

    total: from the number of layers to the number of all their experts
    Returns the numbers of each layer's dominant experts, ascending.
    Source: MC-SMoE, arXiv 2310.01334, section 3.2. Its code keeps what is strictly above the value of rank ``total``,
    so that ties lose groups; here the budget is met exactly.
    """
    ranked = []
    for n, layer in enumerate(layers):
        usage, mass = (t.double() / t.max().clamp_min(1e-300) for t in (layer.count.double(), layer.probability))
        ranked += [(-u, -p, n, e) for e, (u, p) in enumerate(zip(usage.tolist(), mass.tolist(), strict=True))]
    ranked.sort()
    best = {n: next(entry for entry in ranked if entry[2] == n) for n in range(len(layers))}
    rest = [entry for entry in ranked if entry != best[entry[2]]]
    chosen = [*best.values(), *rest[: total - len(best)]]
    return [sorted(e for _, _, of, e in chosen if of == n) for n in range(len(layers))]


def grouping(
    experts: DenseExperts,
    statistics: Used,
    dominants: Sequence[int],
    *,
    similarity: str = "router-logits",
    align: bool = True,
    progress: Progress | None = None,
) -> Grouping:
    """Sends every expert to its most similar dominant expert and brings its neurons into that one's order.

        weights_e = count_e / sum of count over the group, equal where no token met any of them

    dominants: ascending;  similarity: see ``similarities``
    align: False leaves neurons as they are, as the paper's released code for Mixtral does
    """
    like = similarities(experts, statistics, dominants, similarity, align, progress)
    group = like.argmax(1).tolist()
    for g, dominant in enumerate(dominants):
        group[dominant] = g  # also where two dominant experts are alike in every digit
    permutations = torch.arange(experts.intermediate_size).repeat(experts.num_experts, 1)
    if align:
        for e, g in enumerate(group):
            if e != dominants[g]:
                _tell(progress, f"align: expert {e + 1} of {experts.num_experts}")
                permutations[e] = assign(design_matrix(experts, dominants[g]), design_matrix(experts, e))
    index, count = torch.tensor(group), statistics.count.double()
    summed = torch.zeros(len(dominants), dtype=torch.float64).index_add_(0, index, count)[index]
    sizes = torch.tensor(group).bincount()[index]
    return Grouping(group, (count / summed).where(summed > 0, 1 / sizes.double()), permutations)


def similarities(
    experts: DenseExperts,
    statistics: Used,
    dominants: Sequence[int],
    similarity: str,
    align: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """Cosine of every expert with every dominant expert: (E, G) float64.

    router-logits: of the columns of the matrix of router logits, a row for each calibration token
    outputs: of the mean outputs over the tokens of each;  zero where it had none
    weights: of the design matrices, the neurons of one in their best order for the other where ``align``: G E
        assignments, where merging itself has E - G

    Source: MC-SMoE, section 3.2, which maps the cosine to (cos + 1) / 2; the nearest is the same.
    """
    dominants = list(dominants)
    if similarity == "router-logits":
        norm = statistics.logit_gram.diagonal().clamp_min(0).sqrt()
        return _quotient(statistics.logit_gram[:, dominants], norm.unsqueeze(1) * norm[dominants])
    if similarity == "outputs":
        unit = F.normalize(statistics.output.double(), dim=1)
        return product(unit, unit[dominants].T)
    like = torch.zeros(experts.num_experts, len(dominants), dtype=torch.float64)
    for g, d in enumerate(dominants):
        target = design_matrix(experts, d)
        for e in range(experts.num_experts):
            source = design_matrix(experts, e)
            if align and e != d:
                _tell(progress, f"compare: expert {e + 1} with {g + 1} of {len(dominants)} dominant ones")
                source = source[assign(target, source)]
            norms = (squared_norm(target) * squared_norm(source)) ** 0.5
            like[e, g] = float((target * source).sum(1).double().sum()) / norms if norms else 0.0
    return like


def merged_design(experts: DenseExperts, grouping: Grouping, g: int) -> Tensor:
    """The design matrix (I, D) float32 of a group's merged expert: sum over its members of weights_e W_e[pi_e]."""
    merged = torch.zeros_like(design_matrix(experts, 0))
    for e in grouping.members(g):
        merged.add_(aligned_design(experts, grouping, e), alpha=float(grouping.weights[e]))
    return merged


def aligned_design(experts: DenseExperts, grouping: Grouping, e: int) -> Tensor:
    """The design matrix (I, D) float32 of one expert in the neuron order of its group."""
    return design_matrix(experts, e)[grouping.permutations[e]]


def merged_bias_down(experts: DenseExperts, grouping: Grouping) -> Tensor | None:
    """(G, H) in the experts' dtype; None where there is none."""
    if experts.bias_down is None:
        return None
    weighted = experts.bias_down.cpu().double() * grouping.weights.unsqueeze(1)
    merged = torch.zeros(grouping.num_groups, experts.hidden_size, dtype=torch.float64)
    return merged.index_add_(0, torch.tensor(grouping.group), weighted).to(experts.bias_down)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator / denominator).where(denominator > 0, 0)


def _tell(progress: Progress | None, phrase: str) -> None:
    if progress is not None:
        progress(phrase)
