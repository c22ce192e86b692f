"""The module that stands where a model's experts module stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from resmoe_kernels import experts_reference
from resmoe_kernels.dispatch import backends, experts_flat, experts_packed, explain
from resmoe_kernels.factored import PARTS, SIZE_NAMES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.packed import PackedExperts, declines
from resmoe_kernels.python_ops.models.routing import RouterChange, choose_parts, fold, keep_mass, map_slots

PART_ROUTER = "part_router"


class FactoredExpertsLayer(nn.Module):
    """Factored experts behind the contract of transformers: ``forward(hidden_states, top_k_index, top_k_weights)``.

    Its parameters are the tensors of FactoredExperts under their own names, frozen. ``activation`` is a name of
    resmoe_kernels.activations; it comes from the model's class, so a checkpoint does not store it.

    On the CPU, ``pack`` replaces their contents by a block in the order the kernels read; ``from_pretrained`` and
    ``swap_experts`` do so. The parameters of a packed layer are on the meta device: they still say names, shapes,
    dtypes and numbers of parameters, and reading them fails. ``state_dict`` and ``weights`` give the contents, as
    copies: a whole model's ``state_dict`` needs memory for a second model. ``load_state_dict`` and ``to`` work as
    ever, one layer unpacked at a time.

    ``from_pretrained`` and ``pack`` check the contents of the index tensors; whoever loads others into the parameters
    of a layer that is not packed calls ``layer.weights.check_values()``.
    """

    no_threshold: ClassVar[str | None] = None  # why none can be put on the weights that arrive here

    def __init__(self, weights: FactoredExperts, activation: str) -> None:
        super().__init__()
        self.router_change = RouterChange()
        self.reroutes = False  # whether ``route`` has anything to do
        self._expert_of_slot: Tensor | None = None
        self.register_parameter(PART_ROUTER, None)
        for name, value in weights.sizes().items():
            setattr(self, name, value)
        self.activation = activation
        self.differentiable = False
        self.packed: PackedExperts | None = None
        self._packs = False  # once packed, packed again after each move and load
        self._set_parameters(weights)

    def _set_parameters(self, weights: FactoredExperts) -> None:
        for name in TENSOR_NAMES:
            tensor = getattr(weights, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def form(self) -> FactoredExperts:
        """The layer's parameters as a value: of a packed layer, without contents."""
        return self._as_value(lambda parameter: parameter.data)

    def _as_value(self, read: Callable[[nn.Parameter], Tensor]) -> FactoredExperts:
        # Not self._parameters: while peft trains a parameter, it is computed, and no longer among them.
        tensors = {name: read(p) for name in TENSOR_NAMES if (p := getattr(self, name)) is not None}
        return FactoredExperts.from_tensors(tensors, **{name: getattr(self, name) for name in SIZE_NAMES})

    @property
    def weights(self) -> FactoredExperts:
        """The layer's weights as a value; shares memory with the parameters, of a packed layer a copy."""
        return self.form if self.packed is None else self.packed.unpack()

    def change_routing(self, change: RouterChange, part_router: Tensor | None = None) -> None:
        """From now on, what the router sends here is read by ``change``: thinned, mapped, folded, in parts.

        part_router: (E, H) float, a row for every part, see routing.choose_parts
        Raises ValueError for a threshold where none can be put.
        """
        if change.threshold is not None and self.no_threshold is not None:
            raise ValueError(f"threshold: {self.no_threshold}, so none can be put on its weights; use parts")
        self.router_change = change
        thins = change.threshold_over_chosen is not None
        self.reroutes = thins or change.expert_of_slot is not None or change.parts > 1
        if change.expert_of_slot is not None:
            self._expert_of_slot = torch.tensor(change.expert_of_slot, device="cpu")
        if part_router is not None:
            self.register_parameter(PART_ROUTER, nn.Parameter(part_router, requires_grad=False))

    def route(self, hidden_states: Tensor, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The experts (T, K) and weights that the op is given for the slots (T, top_k) the router chose."""
        change = self.router_change
        if change.threshold_over_chosen is not None:
            slots, weights = keep_mass(slots, weights, change.threshold_over_chosen)
        if self._expert_of_slot is not None:
            if self._expert_of_slot.device != slots.device:
                self._expert_of_slot = self._expert_of_slot.to(slots.device)  # once: graphs are captured after a call
            slots = map_slots(slots, self._expert_of_slot)
        if change.fold:
            slots, weights = fold(slots, weights)
        if change.parts > 1:
            router = self._parameters[PART_ROUTER]
            slots, weights = choose_parts(hidden_states, slots, weights, router, change.parts, change.part_mass)
        return slots, weights

    # ---- packing

    def pack(self) -> bool:
        """Packs the weights if they are on the CPU and its kernels are built and serve them; returns whether they are.

        Raises ValueError, as ``check_values`` does, if the contents of the index tensors are wrong.
        """
        if self.packed is not None:
            return True
        weights = self.form
        on_cpu = all(t.device.type == "cpu" for t in weights.tensors().values())
        if on_cpu and "cpu" in backends() and declines(weights, self.activation) is None:
            self.packed = PackedExperts.pack(weights)
            self._packs = True
            self._set_parameters(self.packed.form)
        return self.packed is not None

    def unpack(self) -> None:
        """Gives the parameters their contents back."""
        if self.packed is not None:
            self._set_parameters(self.packed.unpack())
            self.packed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.packed is not None:
            dtypes = self.packed.form.dtypes() or {torch.uint8}  # of codes, which no conversion changes
            samples = [torch.empty(1, dtype=dtype, device="cpu") for dtype in dtypes]
            if all(fn(sample) is sample for sample in samples):
                return self  # to where and what it already is: every to("cpu") would pack all layers anew
            self.unpack()
        super()._apply(partial(_keeping_dtype, fn, self._scales()), recurse)
        if self._packs:
            with suppress(ValueError):  # contents of to_empty, which calls refuse and load_state_dict replaces
                self.pack()
        return self

    def _scales(self) -> list[nn.Parameter]:
        named = self._parameters.items()
        return [p for name, p in named if p is not None and name in PARTS and PARTS[name].holds == "scales"]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.packed is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, tensor in self.weights.tensors().items():
            destination[prefix + name] = tensor
        if (router := self._parameters[PART_ROUTER]) is not None:
            destination[prefix + PART_ROUTER] = router if keep_vars else router.detach()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if self._packs:  # also where an earlier load was refused
            self.pack()

    # ---- training

    def make_differentiable(self, *, train: bool) -> None:
        """Runs by the reference from now on, which has gradients; the op has none.

        train: whether the layer's own floating-point parameters, but for scales of codes, get gradients, or only what
            comes before it
        """
        self.unpack()
        self._packs = False
        self.differentiable = True
        scales = self._scales()
        for parameter in self.parameters():
            learns = parameter.is_floating_point() and not any(parameter is scale for scale in scales)
            parameter.requires_grad_(train and learns)

    def _check_trainable(self) -> None:
        """Raises ValueError if an adapter, peft's on a parameter say, would act on contents that are not there."""
        if self.packed is not None:
            adapted = ", ".join(self._modules["parametrizations"])  # type: ignore[arg-type]
            raise ValueError(
                f"{adapted}: adapted while the layer is packed for the CPU's kernels, which would not see it; call "
                "make_differentiable(train=False) on every FactoredExpertsLayer before get_peft_model, or use fine_tune"
            )

    def end_training(self) -> None:
        """Runs by the op again, frozen, and packed where that is served."""
        self.requires_grad_(False)
        self.zero_grad()
        self.differentiable = False
        self.pack()

    # ---- running

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, top_k) int, top_k_weights (T, top_k) -> (T, H)."""
        if self.reroutes:
            top_k_index, top_k_weights = self.route(hidden_states, top_k_index, top_k_weights)
        if self.differentiable or "parametrizations" in self._modules:
            self._check_trainable()
            weights = self._as_value(lambda parameter: parameter)
            return experts_reference.experts(hidden_states, top_k_index, top_k_weights, weights, self.activation)
        packed = self.packed
        if packed is not None:
            hidden_size = packed.form.hidden_size
            return experts_packed(hidden_states, top_k_index, top_k_weights, packed.block, hidden_size, self.activation)
        parameters = self._parameters
        flat = [parameters[name] for name in TENSOR_NAMES] + [getattr(self, name) for name in SIZE_NAMES]
        return experts_flat(hidden_states, top_k_index, top_k_weights, flat, self.activation)

    def explain(self) -> str:
        """Which backend runs this layer, and why no faster one does."""
        return explain(self.packed or self.form, self.activation)

    def extra_repr(self) -> str:
        parts = [f"E={self.num_experts}, H={self.hidden_size}, I={self.intermediate_size}", self.activation]
        parts += [n for n in ("base_gate_up", "u_gate_up", "mask_gate_up") if self._parameters[n] is not None]
        if self._parameters["mask_gate_up"] is None and self._parameters["values_gate_up"] is not None:
            parts.append("values_gate_up")  # the full residual
        parts += str(self.payloads).split()
        if described := self.router_change.describe():
            parts.append(described)
        return ", ".join(parts)


def check_learns(layers: Mapping[str, FactoredExpertsLayer]) -> None:
    """Raises ValueError naming the first layer whose weights are codes, which take no small steps."""
    for path, layer in layers.items():
        if layer.payloads:
            raise ValueError(
                f"{path}: is stored as codes, {layer.payloads}, which cannot learn; train it in floats and store it as "
                "codes then, see requantise"
            )


def _keeping_dtype(fn: Callable[[Tensor], Tensor], scales: list[nn.Parameter], tensor: Tensor) -> Tensor:
    """``fn``, which ``model.half()`` and others apply to each tensor; of scales, which are bfloat16 by definition, as
    if they were numbers that no conversion of floats concerns."""
    if any(tensor is scale for scale in scales):
        return fn(tensor.view(torch.int16)).view(torch.bfloat16)
    return fn(tensor)


class OneHotExpertsLayer(FactoredExpertsLayer):
    """The same behind the contract of Switch Transformers: a one-hot mask instead of expert ids."""

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states (T, H), selected_experts (T, top_k, E) one-hot, routing_weights (T, top_k) -> (T, H).

        A row of zeros (a token over its expert's capacity) is a skipped slot.
        """
        chosen = selected_experts.argmax(-1)
        top_k_index = torch.where(selected_experts.sum(-1) > 0, chosen, -1)
        return super().forward(hidden_states, top_k_index, routing_weights)


class DenseFFNLayer(FactoredExpertsLayer):
    """The same in place of a dense feed-forward module: one expert in parts, and every token uses it with weight 1."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states (..., H) -> (..., H)."""
        x = hidden_states.flatten(0, -2)
        one = x.new_ones(len(x), 1)
        return super().forward(x, torch.zeros_like(one, dtype=torch.int64), one).view_as(hidden_states)


class SelfRoutedExpertsLayer(FactoredExpertsLayer):
    """The same for a block that routes by itself and calls ``moe_infer``."""

    def moe_infer(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x (T, H); ids and weights (T, top_k), or flattened to (T top_k,) and (T top_k, 1) -> (T, H)."""
        return self(x, expert_ids.reshape(len(x), -1), expert_weights.reshape(len(x), -1))

    def __iter__(self):
        raise ValueError(
            "factored experts cannot be called one by one, as this block does in training: call model.eval()"
        )

    def __getitem__(self, index: int):
        return iter(self)
