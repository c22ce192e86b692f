"""A dense model whose layers are visited one at a time: in memory, or left on disk and brought in as needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.products import total
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, ModuleReader
from resmoe_kernels.python_ops.models.layouts import ExpertsModule, find_experts
from resmoe_kernels.python_ops.models.routers import change_choice
from resmoe_kernels.python_ops.models.routing import RouterChange, Scoring
from resmoe_kernels.python_ops.storage.model_files import refuse_adapter
from resmoe_kernels.python_ops.storage.quantised import METHODS

_BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Hidden:
    """Tokens on their way through the decoder: what enters some layer, in batches of whole windows.

    token_ids: each (windows, L) int64;  states: each (windows, L, H) in the model's dtype
    beside: what the last layer returned with the state, such as the keys that a sparse attention chose, for the layer
        that follows; None where it returned the state alone
    """

    token_ids: list[Tensor]
    states: list[Tensor]
    beside: list[tuple[Any, ...] | None]

    def distance(self, other: Hidden) -> float:
        """||X - Y||_F of the states, summed in float64."""
        pairs = zip(self.states, other.states, strict=True)
        return sum(total((a.float() - b.float()).square()) for a, b in pairs) ** 0.5


class DenseModel:
    """A transformers decoder with experts.

    module: the model, in memory, or on meta with a ``reader`` of its checkpoint. From disk, one decoder layer, the
        embeddings and the carried hidden states are in memory at a time.
    """

    def __init__(
        self, module: nn.Module, reader: ModuleReader | None = None, experts: Sequence[ExpertsModule] | None = None
    ) -> None:
        self.module, self.reader = module, reader
        self.experts = list(find_experts(module) if experts is None else experts)

    # ---- experts

    def read(self, i: int) -> DenseExperts:
        """The weights of ``experts[i]``."""
        experts = self.experts[i]
        if self.reader is None:
            return experts.read({name: p.detach() for name, p in experts.module.named_parameters()})
        return experts.read(self.reader.read(experts.path, experts.parameter_names))

    def scoring(self, i: int) -> Scoring:
        """How the router of ``experts[i]`` scores. Raises ValueError if that is not known."""
        return self.experts[i].scoring(self.module)

    # ---- decoder layers

    @cached_property
    def _layers_path(self) -> str:
        paths = {_list_above(self.module, experts.path) for experts in self.experts}
        if len(paths) != 1 or None in paths or self.module.config.is_encoder_decoder:  # type: ignore[union-attr]
            raise ValueError(
                f"{type(self.module).__name__}: calibration runs decoder-only models whose layers are one list, one "
                "after the other; use a method that needs no data"
            )
        return paths.pop()  # type: ignore[return-value]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.module.get_submodule(self._layers_path)  # type: ignore[return-value]

    def decoder_layer_of(self, i: int) -> int:
        """The number of the decoder layer that holds ``experts[i]``."""
        return int(self.experts[i].path.removeprefix(f"{self._layers_path}.").partition(".")[0])

    def embed(self, token_ids: Tensor) -> Hidden:
        """What enters the first decoder layer. token_ids: (windows, L) int64."""
        if self.reader is not None:
            self._bring_in_what_is_outside_of_layers()
        batches = list(token_ids.split(max(1, _BATCH_TOKENS // token_ids.shape[1])))
        made = [self._through(ids, None, None, None) for ids in batches]
        return Hidden(batches, *map(list, zip(*made, strict=True)))  # type: ignore[arg-type]

    def run(self, hidden: Hidden, start: int, stop: int, changes: Mapping[int, RouterChange] | None = None) -> Hidden:
        """What leaves decoder layer ``stop - 1``, given what enters layer ``start``.

        changes: by number in ``experts``, a change of that layer's router for this run only; pruned slots and
            fewer experts per token, nothing that renumbers experts

        Raises ValueError naming the layer where a hidden state overflows: nothing can be decided on NaN.
        """
        with ExitStack() as stack:
            for i, change in (changes or {}).items():
                if change.changes_choice:
                    stack.callback(change_choice(self.experts[i].router(self.module), change).remove)
            for number in range(start, stop):
                with self.layer_in_memory(number):
                    batches = zip(hidden.token_ids, hidden.states, hidden.beside, strict=True)
                    made = [self._through(ids, number, state, beside) for ids, state, beside in batches]
                hidden = Hidden(hidden.token_ids, *map(list, zip(*made, strict=True)))  # type: ignore[arg-type]
                if not all(bool(torch.isfinite(state).all()) for state in hidden.states):
                    raise ValueError(
                        f"{self._layers_path}.{number}: what leaves this layer is not finite; the model's numbers are "
                        f"too large for its dtype, {hidden.states[0].dtype}, on this text: use it in bfloat16 or "
                        "float32"
                    )
        return hidden

    @contextmanager
    def layer_in_memory(self, number: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights; read from disk, and dropped afterwards, unless the model is in memory."""
        layer = self.decoder_layers[number]
        held = [t for t in layer.state_dict().values() if t.is_meta]
        if self.reader is None or not held:
            yield layer
            return
        self._bring_in(f"{self._layers_path}.{number}", list(layer.state_dict()))
        try:
            yield layer
        finally:
            empty = {name: torch.empty_like(t, device="meta") for name, t in layer.state_dict().items()}
            layer.load_state_dict(empty, assign=True)

    @torch.inference_mode()
    def _through(
        self, token_ids: Tensor, number: int | None, state: Tensor | None, beside: tuple[Any, ...] | None
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        """The output of one decoder layer for ``state``, or the input of the first where ``number`` is None.

        The model's own forward prepares masks and positions for each layer; the other layers are passed over, and what
        the one before returned ``beside`` the state is handed on.
        """

        def stand_in(index: int):
            own = layers[index].forward

            def forward(hidden_states, *args, **kwargs):
                if number is None:
                    raise _Reached(hidden_states, None)
                if index != number:
                    return hidden_states if beside is None else (hidden_states, *beside)
                output = own(state, *args, **kwargs)
                raise _Reached(output[0], output[1:]) if isinstance(output, tuple) else _Reached(output, None)

            return forward

        layers = self.decoder_layers
        training = self.module.training
        self.module.eval()
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                layer.forward = stand_in(index)
                stack.callback(layer.__dict__.pop, "forward")
            try:
                device = self.module.get_input_embeddings().weight.device  # type: ignore[operator]
                self.module(token_ids.to(device), use_cache=False)
            except _Reached as reached:
                return reached.hidden_states, reached.beside
            finally:
                self.module.train(training)
        raise ValueError(f"{type(self.module).__name__}: its forward does not call the layers of {self._layers_path}")

    # ---- from disk

    def _bring_in_what_is_outside_of_layers(self) -> None:
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        head_path = next((path for path, module in self.module.named_modules() if module is head), None)
        unused = tuple(f"{path}." for path in (self._layers_path, head_path) if path is not None)
        outside = [n for n, t in self.module.state_dict().items() if t.is_meta and not n.startswith(unused)]
        self._bring_in("", outside)
        for name, buffer in list(self.module.named_buffers()):
            if buffer.is_meta and name not in self.module.state_dict():
                owner = self.module.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], torch.empty_like(buffer, device="cpu"))
                self.module._init_weights(owner)  # type: ignore[operator]

    def _bring_in(self, path: str, names: list[str]) -> None:
        assert self.reader is not None
        module = self.module.get_submodule(path)
        wanted = module.state_dict()
        kept = [n for kind in ("", "_strict") for n in getattr(self.module, f"_keep_in_fp32_modules{kind}", None) or ()]
        tensors = {}
        for name, tensor in self.reader.read(path, names).items():
            exempt = any(part in f"{path}.{name}" for part in kept)
            tensors[name] = tensor if exempt else tensor.to(wanted[name].dtype)
        module.load_state_dict(tensors, assign=True, strict=False)


class _Reached(BaseException):
    """Leaves a model's forward with what was wanted; not an Exception, so that no model's code holds it up."""

    def __init__(self, hidden_states: Tensor, beside: tuple[Any, ...] | None) -> None:
        self.hidden_states, self.beside = hidden_states, beside


def _list_above(module: nn.Module, path: str) -> str | None:
    parts = path.split(".")
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((p for p in above if isinstance(module.get_submodule(p), nn.ModuleList)), None)


def native_class(config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """transformers' own class of which a checkpoint is, by its config.json; None if it is of other code.

    The auto classes would take another: the text part of what was saved with its images.
    """
    import transformers

    if trust_remote_code and "auto_map" in config:
        return None
    return getattr(transformers, (config.get("architectures") or [""])[0], None)


def build_on_meta(checkpoint: Checkpoint, trust_remote_code: bool) -> nn.Module:
    """The dense model of a checkpoint, without memory for its weights.

    Raises ValueError if the checkpoint is quantised already, an adapter lies beside it, or its architecture cannot be
    built.
    """
    import transformers

    refuse_adapter(checkpoint.folder)
    kind = checkpoint.quantised
    if kind is not None and kind not in METHODS:
        known = " or ".join(METHODS)
        hint = "it is compressed already" if kind == "resmoe" else f"start from an unquantised checkpoint, or {known}"
        raise ValueError(f"{checkpoint.folder}: holds {kind}-quantised weights; {hint}")
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        native = native_class(checkpoint.config, trust_remote_code)
        dtype = config.dtype or torch.float32
        with torch.device("meta"):
            if native is not None:
                return native._from_config(config, dtype=dtype)
            auto = transformers.AutoModelForCausalLM
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any type: what a model's class says to values it does not like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{checkpoint.folder}: transformers cannot build this model: {reason}") from error
