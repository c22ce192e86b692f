"""What every method is and leaves behind: Method, Chain, Compressed, and what their reports share."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn
from tqdm.auto import tqdm

from resmoe_kernels.factored import MATRICES, DenseExperts, FactoredExperts
from resmoe_kernels.python_ops.models.layouts import DenseFFN, ExpertsModule, find_experts
from resmoe_kernels.python_ops.models.routing import RouterChange
from resmoe_kernels.python_ops.solvers.align import relative
from resmoe_kernels.python_ops.solvers.rounding import FLOATS, Storage

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics, Statistics
    from resmoe_kernels.python_ops.models.dense_model import DenseModel

_log = logging.getLogger("resmoe_kernels")

# plans so far, one for each layer -> what ``measure`` finds in each
Measure = Callable[[Sequence[dict[str, Any]]], list[dict[str, Tensor]]]


def warn_of_unreached(path: str, counts: Tensor, consequence: str) -> None:
    """Names the experts of a layer that no calibration token reached. counts: (E,), tokens of each."""
    unreached = (counts == 0).nonzero().flatten().tolist()
    if unreached:
        _log.warning(
            "%s: no calibration token reached expert%s %s; %s; use more tokens",
            path,
            "s" if len(unreached) > 1 else "",
            ", ".join(map(str, unreached)),
            consequence,
        )


class Compressed(NamedTuple):
    """What a method makes of one layer.

    report: a dataclass of plain numbers with at least relative_error, bytes_dense and bytes_now
    change: None where the router stays as it is;  part_router: (E, H) float, where it has parts
    """

    weights: FactoredExperts
    report: Any
    change: RouterChange | None = None
    part_router: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A method with all its settings applied, defaults included."""

    name: str
    settings: dict[str, Any]
    needs_statistics: bool
    _function: Callable[..., Compressed]
    _plan: Callable[..., list[dict[str, Any]]] | None = None
    _find: Callable[[nn.Module], list[ExpertsModule]] | None = None
    _measure: Callable[..., dict[str, Tensor]] | None = None  # where the settings ask for it
    _peak_bytes: Callable[..., int] | None = None
    less_memory: str | None = None  # what to set where there is too little
    fits: bool = False  # under the moments of experts, see LayerMoments
    storage: Storage = FLOATS
    _check_model: Callable[..., None] | None = None

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings, those of how the result is stored included, as config.json has them."""
        return self.settings | self.storage.recorded()

    def find(self, model: nn.Module) -> list[ExpertsModule]:
        """The modules it compresses. Raises ValueError if there are none."""
        return find_experts(model) if self._find is None else self._find(model)

    def check_model(self, model: DenseModel, chosen: Sequence[int]) -> None:
        """Raises ValueError if the method cannot do with these layers of ``model.experts``; cheap, before all work."""
        if self.needs_statistics:
            for i in range(len(model.experts)):  # all of which a calibration watches
                if not isinstance(model.experts[i], DenseFFN):
                    model.experts[i].router(model.module)
        if self._check_model is not None:
            self._check_model(model, chosen)

    @property
    def says_memory(self) -> bool:
        return self._peak_bytes is not None

    def peak_bytes(self, found: ExpertsModule) -> int:
        """What compressing this module takes, the module included."""
        assert self._peak_bytes is not None
        return self._peak_bytes(found.read(dict(found.module.named_parameters())), **self.settings)

    def plan(
        self,
        model: DenseModel,
        chosen: Sequence[int],
        statistics: Statistics | None,
        progress: bool,
        measure: Measure | None = None,
    ) -> list[dict[str, Any]]:
        """What is decided over all layers, before the first is compressed: a dict of plain values and tensors for each.

        model: the dense model, its layers read one at a time;  chosen: numbers in ``model.experts`` of the layers
            to compress;  statistics: from calibration, for methods that need them
        measure: how the layers are measured where the settings ask for it; None measures them here, in turn
        """
        if self._plan is None:
            return [{} for _ in chosen]
        given: dict[str, Any] = {"statistics": statistics, "progress": progress}
        if self._measure is not None:
            given["measured"] = (measure or _measure_in_turn(self, model, chosen, statistics, progress))(
                [{}] * len(chosen)
            )
        return self._plan(model, chosen, **given, **self.settings)

    def measure(
        self,
        experts: DenseExperts,
        *,
        plan: dict[str, Any],
        statistics: LayerStatistics | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Tensor]:
        """What a plan over all layers asks of one, in small tensors. statistics, progress: as below."""
        assert self._measure is not None
        taken = inspect.signature(self._measure).parameters
        given = {"statistics": statistics} if "statistics" in taken else {}
        return self._measure(experts, progress=progress, **given, **self.settings)

    def __call__(
        self,
        experts: DenseExperts,
        *,
        plan: dict[str, Any] | None = None,
        statistics: LayerStatistics | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Compressed:
        """Compresses one layer. progress: called with a short phrase after every step."""
        given = {"plan": plan, "statistics": statistics, "progress": progress, "storage": self.storage}
        taken = inspect.signature(self._function).parameters
        return self._function(experts, **self.settings, **{n: v for n, v in given.items() if n in taken})


@dataclass(frozen=True)
class Chain:
    """Two methods as one: xmoe, which leaves dense experts, and one that compresses those."""

    first: Method
    second: Method
    says_memory: ClassVar[bool] = False
    less_memory: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.second.needs_statistics and self.first.settings["parts"] > 1:
            raise ValueError(
                f"method: {self.second.name} needs statistics of the experts it compresses, and those of parts are "
                "not collected; leave parts at 1, or follow with resmoe and a budget other than usage"
            )

    @property
    def name(self) -> str:
        return f"{self.first.name}+{self.second.name}"

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.first.settings, **self.second.settings}

    @property
    def fits(self) -> bool:
        return self.second.fits and self.first.settings["parts"] == 1  # of parts no moments are collected

    @property
    def recorded(self) -> dict[str, Any]:
        return {**self.first.recorded, **self.second.recorded}

    @property
    def needs_statistics(self) -> bool:
        return self.first.needs_statistics or self.second.needs_statistics

    def find(self, model: nn.Module) -> list[ExpertsModule]:
        return self.first.find(model)

    def check_model(self, model: DenseModel, chosen: Sequence[int]) -> None:
        self.first.check_model(model, chosen)
        self.second.check_model(model, chosen)

    def plan(
        self,
        model: DenseModel,
        chosen: Sequence[int],
        statistics: Statistics | None,
        progress: bool,
        measure: Measure | None = None,
    ) -> list[dict[str, Any]]:
        firsts = [{"first": plan} for plan in self.first.plan(model, chosen, statistics, progress)]
        measure = measure or _measure_in_turn(self, model, chosen, statistics, progress)
        # What the second measures is what the first leaves.
        seconds = self.second.plan(model, chosen, statistics, progress, lambda _: measure(firsts))
        return [{**first, "second": second} for first, second in zip(firsts, seconds, strict=True)]

    def measure(self, experts: DenseExperts, *, plan: dict[str, Any], **given: Any) -> dict[str, Tensor]:
        return self.second.measure(self._between(experts, plan, given)[1], plan={}, **given)

    def __call__(self, experts: DenseExperts, *, plan: dict[str, Any], **given: Any) -> Compressed:
        made, dense = self._between(experts, plan, given)
        then = self.second(dense, plan=plan["second"], **given)
        return then._replace(change=_joined(made.change, then.change), part_router=made.part_router)

    def _between(
        self, experts: DenseExperts, plan: dict[str, Any], given: dict[str, Any]
    ) -> tuple[Compressed, DenseExperts]:
        """What the first makes, and the dense experts it leaves."""
        made = self.first(experts, plan=plan["first"], **given)
        return made, made.weights.materialize(experts.gate_up.dtype)  # exact: xmoe leaves bases only


def _measure_in_turn(
    method: Method | Chain, model: DenseModel, chosen: Sequence[int], statistics: Statistics | None, progress: bool
) -> Measure:
    def measure(plans: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
        measured = []
        for i, plan in zip(tqdm(chosen, desc="measuring", unit="layer", disable=not progress), plans, strict=True):
            of_layer = None if statistics is None else statistics.layers[model.experts[i].path]
            measured.append(method.measure(model.read(i), plan=plan, statistics=of_layer))
        return measured

    return measure


def _joined(first: RouterChange | None, second: RouterChange | None) -> RouterChange | None:
    """What xmoe changes, a threshold and parts, and what another method does to the slots."""
    if first is None or second is None:
        return first or second
    return replace(
        second,
        scoring=second.scoring or first.scoring,
        threshold=first.threshold,
        parts=first.parts,
        part_mass=first.part_mass,
    )


def check_known(argument: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError unless a setting's value is one of those known."""
    if value not in known:
        raise ValueError(f"{argument}: must be one of {', '.join(known)}, got {value!r}")


def weight_errors(lost: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
    """relative_error, relative_error_gate_up and relative_error_down of a report, from sums of squares by matrix."""
    by_matrix = {f"relative_error_{matrix}": relative(lost[matrix], whole[matrix]) for matrix in MATRICES}
    return {"relative_error": relative(sum(lost.values()), sum(whole.values())), **by_matrix}


def warn_if_not_smaller(method: str, report: Any, what_to_do: str) -> None:
    """Warns where a compressed layer takes no fewer bytes than the dense one."""
    if report.bytes_now >= report.bytes_dense:
        _log.warning(
            "%s: %d bytes, not smaller than the dense layer's %d; %s",
            method,
            report.bytes_now,
            report.bytes_dense,
            what_to_do,
        )
