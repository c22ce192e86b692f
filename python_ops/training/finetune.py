"""Fine-tuning: a factored model learns from the dense one it was made of, and may be pruned while it learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from resmoe_kernels.factored import MATRICES, FactoredExperts
from resmoe_kernels.python_ops.models.hf_quantizer import ResMoEConfig, layer_spec
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer, check_learns
from resmoe_kernels.python_ops.solvers.factorize import low_rank
from resmoe_kernels.python_ops.solvers.prune import keep_entries, keep_rows, stack_bitmaps

# The paper's 400 and 1,600 of 10,000 steps: before the first nothing is pruned, in the last no more than before.
WARM_UP, COOL_DOWN = 0.04, 0.16
SMOOTHING = 0.85
_BASES = tuple(f"base_{matrix}" for matrix in MATRICES)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    distillation: float = 0.2,
    temperature: float = 2.0,
    density: float | None = None,
    retain: float = 0.25,
    rows: bool = False,
    progress: bool = True,
) -> list[float]:
    """Trains a factored language model on tokens and on what the dense model makes of them.

        loss = CE(next token) + distillation KL(softmax(teacher / temperature) || softmax(student / temperature))

    by Adam, at a rate that falls to 0 in a straight line. Everything learns but the routers. With a ``density``, every
    merged expert B_g first becomes U_g V_g + S_g, S_g = B_g - U_g V_g, and S is pruned over all layers together:

        importance <- 0.85 importance + 0.15 |S dloss/dS|        movement: how much the loss hangs on an entry
        S <- 0 but for the share P of its entries that are most important, after every step
        P = density + (1 - density) (1 - p)^3                    p from 0 at 4 % of the steps to 1 at 84 %

    What was pruned still learns, and may come back.

    student: a causal language model with factored layers and float32 parameters; runs in eval mode, without dropout.
        For a density its layers must be of mc-smoe's stage ``merge``: one base for each expert and nothing else
    teacher: the dense model
    batches: each (B, L) int64 token ids, one for every step
    steps: of the optimiser
    density: of S in the end, in (0, 1]; None to train without pruning
    retain: the share of the parameters for U V, in [0, 1), see low_rank
    rows: prunes whole rows of S, those of the smallest mean importance, as the paper does
    Returns the loss of every step. Afterwards the layers run the op again, S in the bitmap layout, and
    ``save_pretrained`` writes them. Memory: both models; gradients and two moments of all that learns; S dense, and
    its importance.

    Raises ValueError naming the argument or parameter, what it may be and what came.
    Source: MC-SMoE, arXiv 2310.01334, section 3.3, on LoSparse, arXiv 2306.11222. The paper trains twice, as two calls
    do here: without a density after merging, with one to compress.
    """
    layers = {path: m for path, m in student.named_modules() if isinstance(m, FactoredExpertsLayer)}
    _check(student, layers, steps, temperature, density, retain)
    routers = [p for path, layer in layers.items() for p in _router_parameters(student, path, layer)]
    source, losses = iter(batches), []
    teacher.eval()
    with _learning(student, layers, routers, None if density is None else retain) as learners:
        optimiser = torch.optim.Adam(learners, lr=learning_rate)
        rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        sparse = [] if density is None else [layer.get_parameter(base) for layer in layers.values() for base in _BASES]
        movement = _Movement(sparse, rows)
        for step in tqdm(range(1, steps + 1), desc="fine-tuning", unit="step", disable=not progress):
            token_ids = next(source, None)
            if token_ids is None:
                raise ValueError(f"batches: ended after {step - 1} of {steps} steps; give more, or fewer steps")
            loss = _loss(student, teacher, token_ids, distillation, temperature)
            optimiser.zero_grad()
            loss.backward()
            movement.observe()
            optimiser.step()
            rate.step()
            if density is not None:
                movement.prune(share_kept(step, steps, density))
            losses.append(float(loss.detach()))
    return losses


def share_kept(step: int, steps: int, density: float) -> float:
    """P after ``step`` of ``steps``, see distil."""
    start, stop = WARM_UP * steps, (1 - COOL_DOWN) * steps
    done = min(max((step - start) / (stop - start), 0.0), 1.0)
    return density + (1 - density) * (1 - done) ** 3


class _Movement:
    """The importance of every entry of the sparse parts (E, N, K), and pruning by it."""

    def __init__(self, parts: Sequence[nn.Parameter], rows: bool) -> None:
        self.parts, self.keep = parts, keep_rows if rows else keep_entries
        self.importance = [torch.zeros_like(part) for part in parts]

    @torch.no_grad()
    def observe(self) -> None:
        for part, importance in zip(self.parts, self.importance, strict=True):
            assert part.grad is not None
            importance.mul_(SMOOTHING).add_((part * part.grad).abs(), alpha=1 - SMOOTHING)

    @torch.no_grad()
    def prune(self, share: float) -> None:
        budget = math.floor(share * sum(part.numel() for part in self.parts))
        keep = self.keep([importance.flatten(0, 1) for importance in self.importance], budget)
        for part, kept in zip(self.parts, keep, strict=True):
            part.mul_(kept.view_as(part))


def _loss(student: nn.Module, teacher: nn.Module, token_ids: Tensor, distillation: float, temperature: float) -> Tensor:
    token_ids = token_ids.to(next(student.parameters()).device)
    with torch.no_grad():
        wanted = teacher(input_ids=token_ids, use_cache=False).logits.float()
    logits = student(input_ids=token_ids, use_cache=False).logits.float()
    hard = F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
    soft = F.kl_div(
        (logits / temperature).log_softmax(-1).flatten(0, 1),
        (wanted / temperature).log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    return hard + distillation * soft


# ---- what learns


@contextmanager
def _learning(
    student: nn.Module, layers: dict[str, FactoredExpertsLayer], routers: list[nn.Parameter], retain: float | None
) -> Iterator[list[nn.Parameter]]:
    """Gives gradients to all but the routers; afterwards the layers run the op, and others learn that did before.

    retain: splits the layers' bases into U V and S for as long as they learn; None leaves them
    """
    before = [(p, p.requires_grad) for p in student.parameters()]
    training = student.training
    for layer in layers.values():
        if retain is not None:
            _set_weights(layer, _with_low_rank(layer.weights, retain))
        layer.make_differentiable(train=True)
    frozen = {id(p) for p in routers}
    learners = [p for p in student.parameters() if p.is_floating_point() and id(p) not in frozen]
    for parameter in learners:
        parameter.requires_grad_(True)
    for parameter in routers:
        parameter.requires_grad_(False)
    student.eval()
    try:
        yield learners
    finally:
        student.train(training)
        student.zero_grad()
        for parameter, learnt in before:
            parameter.requires_grad_(learnt)
        for layer in layers.values():
            _set_weights(layer, layer.weights if retain is None else _with_sparse(layer.weights))
            layer.end_training()
        _record(student, layers)


def _router_parameters(student: nn.Module, path: str, layer: FactoredExpertsLayer) -> list[nn.Parameter]:
    """What chooses among a layer's experts: parameters beside it, in its block, with a row for every slot."""
    change = layer.router_change
    slots = len(change.expert_of_slot or range(layer.num_experts // change.parts))
    above, _, own = path.rpartition(".")
    beside = student.get_submodule(above).named_parameters()
    found = [p for name, p in beside if not name.startswith(f"{own}.") and len(p) == slots]
    if not found and slots > 1:
        raise ValueError(f"{path}: found no router of {slots} experts beside it, so it cannot be kept from learning")
    return found if layer.part_router is None else [*found, layer.get_parameter("part_router")]


def _set_weights(layer: FactoredExpertsLayer, weights: FactoredExperts) -> None:
    layer.unpack()
    layer._set_parameters(weights)


def _with_low_rank(merged: FactoredExperts, retain: float) -> FactoredExperts:
    """B_g = U_g V_g + S_g, with S in place of the base."""
    gate_up, down = merged.base_gate_up, merged.base_down
    assert gate_up is not None and down is not None
    if not retain:
        return merged
    low = low_rank(lambda e: (gate_up[e], down[e]), merged.num_experts, retain=retain, gated=merged.gated)
    split = dataclasses.replace(merged, **low)
    nothing = torch.full((merged.num_experts,), -1, dtype=torch.int32, device=gate_up.device)
    low_only = dataclasses.replace(split, group=nothing).materialize()
    return dataclasses.replace(split, base_gate_up=gate_up - low_only.gate_up, base_down=down - low_only.down)


def _with_sparse(trained: FactoredExperts) -> FactoredExperts:
    """What is left of the bases in the bitmap layout."""
    gate_up, down = trained.base_gate_up, trained.base_down
    assert gate_up is not None and down is not None
    left = (((g, d), (g != 0, d != 0)) for g, d in zip(gate_up, down, strict=True))
    return dataclasses.replace(trained, group=None, base_gate_up=None, base_down=None, **stack_bitmaps(left))


def _record(student: nn.Module, layers: dict[str, FactoredExpertsLayer]) -> None:
    """What config.json says of the layers, where it says something."""
    quantization = getattr(getattr(student, "config", None), "quantization_config", None)
    if isinstance(quantization, ResMoEConfig):
        for path, layer in layers.items():
            spec = quantization.layers[path]
            spec |= layer_spec(layer.form, layer.router_change, layer.part_router)
            if "report" in spec:
                spec["report"]["bytes_now"] = layer.form.nbytes()


# ---- what can be trained


def _check(
    student: nn.Module,
    layers: dict[str, FactoredExpertsLayer],
    steps: int,
    temperature: float,
    density: float | None,
    retain: float,
) -> None:
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    if not temperature > 0:
        raise ValueError(f"temperature: must be above 0, got {temperature}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density: must be in (0, 1], got {density}")
    if not 0 <= retain < 1:
        raise ValueError(f"retain: must be in [0, 1), got {retain}")
    if not layers:
        raise ValueError(f"student: {type(student).__name__} holds no factored layers; compress it first")
    check_learns(layers)
    for name, parameter in student.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: must be float32 to learn in small steps, got {dtype}; use student.float()")
    if density is not None:
        for path, layer in layers.items():
            form = layer.form
            own = form.base_gate_up is not None and len(form.base_gate_up) == form.num_experts
            if not own or form.u_gate_up is not None or form.mask_gate_up is not None:
                raise ValueError(
                    f"{path}: with a density, its experts must be merged ones, a base each and nothing else; "
                    "compress with method='mc-smoe', stage='merge'"
                )
