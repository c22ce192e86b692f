"""Checkpoints on disk: all spellings read the same, damage is named, and a copy is one bit for bit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import resmoe_kernels as rk
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, ModuleReader, check_finite
from resmoe_kernels.python_ops.models.layouts import find_experts
from resmoe_kernels.python_ops.storage.files import copy_file, write_json, write_subset, write_tensors
from resmoe_kernels.python_ops.storage.model_files import INDEX, SINGLE
from resmoe_kernels.python_ops.storage.shards import read_shard
from tests import families

pytestmark = pytest.mark.usefixtures("one_thread")
Tensors = dict[str, Tensor]


# ---- the same model in every spelling


def stacked(state: Tensors) -> Tensors:
    return state


def per_expert(state: Tensors, gate: str, up: str, down: str, block: str = "mlp") -> Tensors:
    """One matrix per expert, as most checkpoints on the hub are."""
    spelled = {}
    for name, tensor in state.items():
        head, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, (first, second) in enumerate(t.chunk(2) for t in tensor):
                spelled[f"{head}.{e}.{gate}.weight"], spelled[f"{head}.{e}.{up}.weight"] = first, second
        elif last == "down_proj" and tensor.dim() == 3:
            spelled.update({f"{head}.{e}.{down}.weight": t for e, t in enumerate(tensor)})
        else:
            spelled[name] = tensor
    return {name.replace(".mlp.", f".{block}."): tensor for name, tensor in spelled.items()}


def mixtral_on_the_hub(state: Tensors) -> Tensors:
    return per_expert(state, "w1", "w3", "w2", "block_sparse_moe")


def named_projections(state: Tensors) -> Tensors:
    return per_expert(state, "gate_proj", "up_proj", "down_proj")


SPELLINGS = [
    pytest.param("mixtral", stacked, id="mixtral-stacked"),
    pytest.param("mixtral", mixtral_on_the_hub, id="mixtral-w1-w2-w3"),
    pytest.param("qwen2_moe", stacked, id="qwen2_moe-stacked"),
    pytest.param("qwen2_moe", named_projections, id="qwen2_moe-gate_proj-up_proj-down_proj"),
    pytest.param("deepseek_v2", named_projections, id="deepseek_v2-gate_proj-up_proj-down_proj"),
]


def write_single(folder: Path, tensors: Tensors) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})


def write_sharded(folder: Path, tensors: Tensors, shards: int = 3) -> None:
    """Tensors dealt out in turn, so that every expert of a layer is spread over all shards."""
    parts: list[Tensors] = [{} for _ in range(shards)]
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[i % shards][name] = tensor.contiguous()
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


WRITERS = [pytest.param(write_single, id="single"), pytest.param(write_sharded, id="sharded")]
Spell = Callable[[Tensors], Tensors]


def make(folder: Path, family: str, spell: Spell = stacked, write=write_single):
    """A checkpoint written by hand, nothing but config.json and weights. Returns the dense model."""
    model = families.build(family)
    folder.mkdir()
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, spell(model.state_dict()))
    return model


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("family", "spell"), SPELLINGS)
def test_every_spelling_reads_the_same(family, spell, write, tmp_path):
    model = make(tmp_path / "dense", family, spell, write)
    reader = ModuleReader(Checkpoint(tmp_path / "dense"), on_meta(model))
    for experts in find_experts(model):
        read = reader.read(experts.path, experts.parameter_names)
        assert list(read) == experts.parameter_names
        for name, tensor in read.items():
            assert torch.equal(tensor, model.get_parameter(f"{experts.path}.{name}")), name


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("family", "spell"), SPELLINGS)
def test_every_spelling_compresses_to_the_same(family, spell, write, tmp_path):
    """Bit for bit, the tensors that are not experts included; and transformers finds no key missing or left over."""
    model = make(tmp_path / "plain", family)
    make(tmp_path / "spelled", family, spell, write)
    plain = rk.compress(tmp_path / "plain", tmp_path / "plain-out", progress=False)
    out = rk.compress(tmp_path / "spelled", tmp_path / "out", progress=False)

    files = sorted(p.name for p in plain.glob("experts-*"))
    assert files == sorted(p.name for p in out.glob("experts-*"))
    assert len(files) == len(find_experts(model))
    for file in files:
        assert (plain / file).read_bytes() == (out / file).read_bytes()
    first, info = type(model).from_pretrained(plain, output_loading_info=True)
    second, other_info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and not any(other_info.values())
    state, dense = second.state_dict(), model.state_dict()
    assert state.keys() == first.state_dict().keys()
    rest = state.keys() & dense.keys()
    assert len(rest) > 10
    assert [name for name in rest if not torch.equal(state[name], dense[name])] == []
    assert torch.equal(families.logits(first), families.logits(second))


def test_tensors_beside_experts_in_a_shard_keep_their_bits(tmp_path):
    """Also bits that arithmetic would lose: a negative zero, a subnormal number; and a tensor of no elements."""
    folder = tmp_path / "dense"
    model = make(folder, "mixtral", mixtral_on_the_hub)
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][:2] = torch.tensor([-0.0, 1e-42])
    tensors["model.empty"] = torch.empty(0, 3)
    tensors["model.counter"] = torch.tensor(7)
    write_single(folder, tensors)
    out = rk.compress(folder, tmp_path / "out", progress=False)
    copied = load_file(out / "model-00001-of-00001.safetensors")
    assert {name for name in tensors if ".experts." not in name} == copied.keys()
    for name, tensor in copied.items():
        same = (
            tensor.contiguous().view(-1).view(torch.uint8),
            tensors[name].contiguous().view(-1).view(torch.uint8),
        )
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert torch.equal(*same), name
    assert len(find_experts(model)) == 2


# ---- folders that cannot be read


@pytest.fixture
def folder(tmp_path) -> Path:
    make(tmp_path / "dense", "mixtral", mixtral_on_the_hub, write_sharded)
    return tmp_path / "dense"


SHARD = "model-00002-of-00003.safetensors"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        Checkpoint(folder)
    assert "\n" not in str(error.value)


def test_missing_shard(folder):
    (folder / SHARD).unlink()
    refused(folder, rf"{SHARD}: this shard of the checkpoint is missing$")


CUTS = {
    "no bytes at all": lambda size, header: 0,
    "inside the header's length": lambda size, header: 5,
    "right after the length": lambda size, header: 8,
    "inside the header": lambda size, header: 8 + header // 2,
    "one byte before the header's end": lambda size, header: 8 + header - 1,
    "right after the header": lambda size, header: 8 + header,
    "inside the data": lambda size, header: (size + header) // 2,
    "one byte before the end": lambda size, header: size - 1,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_truncated_shard(folder, cut):
    whole = (folder / SHARD).read_bytes()
    size = cut(len(whole), struct.unpack("<Q", whole[:8])[0])
    (folder / SHARD).write_bytes(whole[:size])
    refused(folder, rf"{SHARD}: truncated or damaged safetensors file of {size} bytes")


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 64, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 8) + b"not json", b"\x80\x02}q\x00."],
    ids=["noise", "a header longer than any file", "a header that is not JSON", "a pickle"],
)
def test_a_shard_that_is_no_safetensors(folder, content):
    (folder / SHARD).write_bytes(content)
    refused(folder, rf"{SHARD}: truncated or damaged safetensors file of {len(content)} bytes")


def test_longer_than_its_header_says(folder):
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")
    refused(folder, rf"{SHARD}: truncated or damaged")


def test_a_shard_lacks_a_promised_tensor(folder):
    tensors = load_file(folder / SHARD)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, folder / SHARD)
    refused(folder, rf"{SHARD}: lacks {name}, which the index places there$")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"weight_map": {', "index.json: not valid JSON"),
        ("[1]", "index.json: must be a JSON object, got a list"),
        ("{}", "index.json: weight_map must name a file of this folder for every tensor"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "weight_map must name a file of this folder"),
        ('{"weight_map": {"a": 3}}', "weight_map must name a file of this folder"),
        ('{"weight_map": {}}', "weight_map must name a file of this folder"),
    ],
)
def test_damaged_index(folder, text, match):
    (folder / INDEX).write_text(text)
    refused(folder, match)


def test_the_single_file_goes_before_the_index(folder):
    """As from_pretrained has it: an index left over beside a single file says nothing."""
    write_single(folder, {"a": torch.ones(2)})
    assert list(Checkpoint(folder).shards) == [SINGLE]
    assert list(Checkpoint(folder).shard_of) == ["a"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(folder, name):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / name).write_bytes(b"\x80\x02}q\x00.")
    refused(folder, rf"only pickle weights \({name}\); convert them to safetensors first$")


def test_no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    refused(folder, r"no model.safetensors and no model.safetensors.index.json$")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no config.json, so not a Hugging Face model folder"),
        ("{", "config.json: not valid JSON"),
        ("", "config.json: not valid JSON"),
        ('"mixtral"', "config.json: must be a JSON object, got a str"),
    ],
)
def test_no_config(folder, text, match):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, match)


def test_no_folder(tmp_path):
    refused(tmp_path / "gone", r"gone: no such model folder \(download a hub model first\)$")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", r"file: no such model folder")


# ---- tensors that do not make the module


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
W1 = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"


def change(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / SINGLE)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    write_single(folder, tensors)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({W1.format(2): None}, rf"^{GATE_UP}: its tensors in the checkpoint do not fit together"),
        (
            {W1.format(2): torch.ones(47, 32)},
            rf"^{GATE_UP}: its tensors in the checkpoint do not fit together",
        ),
        (
            {W1.format(4): torch.ones(48, 32)},
            rf"^{GATE_UP}: its tensors in the checkpoint do not fit together",
        ),
        (
            {W1.format(e): torch.ones(40, 32) for e in range(4)},
            rf"^{GATE_UP}: config.json wants \(4, 96, 32\), the checkpoint has \(4, 88, 32\)$",
        ),
        (
            {W1.format(e): None for e in range(4)},
            rf"^{GATE_UP}: its tensors in the checkpoint do not fit together",
        ),
        (
            {W1.format(1): torch.ones(48, 32, dtype=torch.int8)},
            rf"^{W1.format(1)}: must be float16, bfloat16, float32 or float64, got int8; dequantise it first$",
        ),
        (
            {W1.format(3): torch.ones(48, 32).to(torch.float8_e4m3fn)},
            rf"^{W1.format(3)}: must be .* got float8_e4m3fn; dequantise it first$",
        ),
        (
            {W1.format(3): torch.full((48, 32), torch.inf)},
            rf"^{W1.format(3)}: all weights must be finite, got inf at \(0, 0\)$",
        ),
        (
            {"lm_head.weight": torch.ones(63, 32)},
            r"^lm_head.weight: config.json wants \(64, 32\), the checkpoint has \(63, 32\)$",
        ),
    ],
    ids=[
        "an expert missing",
        "an expert narrower",
        "an expert too many",
        "all experts narrower",
        "no w1 at all",
        "int8",
        "fp8",
        "infinite",
        "another vocabulary",
    ],
)
def test_tensors_that_do_not_make_the_module(changes, match, tmp_path):
    model = make(tmp_path / "dense", "mixtral", mixtral_on_the_hub)
    change(tmp_path / "dense", changes)
    with pytest.raises(ValueError, match=match) as error:
        reader = ModuleReader(Checkpoint(tmp_path / "dense"), on_meta(model))
        reader.read("model.layers.1.mlp.experts", ["gate_up_proj", "down_proj"])
    assert "\n" not in str(error.value)


def test_a_parameter_without_tensors(tmp_path):
    model = make(tmp_path / "dense", "mixtral", mixtral_on_the_hub)
    names = [name for name in load_file(tmp_path / "dense" / SINGLE) if name.startswith("model.layers.1.block")]
    change(tmp_path / "dense", dict.fromkeys(names))
    reader = ModuleReader(Checkpoint(tmp_path / "dense"), on_meta(model))
    with pytest.raises(ValueError, match=rf"dense: no tensor in the checkpoint makes {GATE_UP}$"):
        reader.names_on_disk("model.layers.1.mlp.experts", ["gate_up_proj", "down_proj"])


def test_stacked_tensors_of_another_shape(tmp_path):
    model = make(tmp_path / "dense", "mixtral")
    change(tmp_path / "dense", {GATE_UP: torch.ones(3, 96, 32)})
    with pytest.raises(ValueError, match=rf"^{GATE_UP}: config.json wants \(4, 96, 32\), .* has \(3, 96, 32\)$"):
        ModuleReader(Checkpoint(tmp_path / "dense"), on_meta(model))


# ---- finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_not_finite_is_named_with_its_place(value, dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    tensor[1, 4] = float(value)
    with pytest.raises(ValueError, match=rf"^w: all weights must be finite, got {value} at \(1, 4\)$"):
        check_finite("w", tensor)


def test_infinities_that_cancel_are_found():
    with pytest.raises(ValueError, match=r"got inf at \(0,\)$"):
        check_finite("w", torch.tensor([torch.inf, -torch.inf]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_are_finite(dtype):
    """Their sum is not, not even in float64."""
    check_finite("w", torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
    check_finite("w", torch.empty(0, dtype=dtype))


def test_whole_numbers_are_finite():
    check_finite("w", torch.tensor([1, 2]))
    check_finite("w", torch.tensor([True]))


# ---- writing


def test_write_subset_copies_bytes(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8),  # an odd size before others: their data are not aligned
        "half": torch.randn(3, 7).half(),
        "whole": torch.tensor([2**40, -1]),
        "long": torch.randn(70, 11),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "all", metadata={"format": "pt"})
    wanted = ["long", "bytes", "flags"]
    write_subset(read_shard(tmp_path / "all"), iter(wanted), tmp_path / "some")
    copied = load_file(tmp_path / "some")
    assert copied.keys() == set(wanted)
    for name, tensor in copied.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
    with safe_open(tmp_path / "some", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert struct.unpack("<Q", (tmp_path / "some").read_bytes()[:8])[0] % 8 == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "some"]


def test_write_subset_of_a_shard_that_shrank(tmp_path):
    """Cut short after its header was read: an error, and no file under the final name."""
    save_file({"a": torch.ones(100)}, tmp_path / "all")
    shard = read_shard(tmp_path / "all")
    with (tmp_path / "all").open("rb+") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"all: ends before the data its header promises$"):
        write_subset(shard, ["a"], tmp_path / "some")
    assert not (tmp_path / "some").exists()


def test_write_tensors_always_writes_the_same_bytes(tmp_path):
    """A resumed job must end in the same bytes; the metadata of safetensors has no order of its own."""
    tensors = {name: torch.full((3,), i) for i, name in enumerate("badc")}
    for i in range(20):
        write_tensors(tensors, tmp_path / f"{i}")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_write_tensors_takes_views(tmp_path):
    matrix = torch.arange(6).view(2, 3)
    write_tensors({"turned": matrix.T, "part": matrix[:, 1:]}, tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["turned"], matrix.T)
    assert torch.equal(load_file(tmp_path / "file")["part"], matrix[:, 1:])


def test_a_part_left_over_is_overwritten(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"12345")
    for target in ("copy", "json", "tensors"):
        (tmp_path / f".{target}.part").write_bytes(b"x" * 10_000)
    copy_file(source, tmp_path / "copy")
    write_json({"a": 1}, tmp_path / "json")
    write_tensors({"a": torch.ones(1)}, tmp_path / "tensors")
    assert (tmp_path / "copy").read_bytes() == b"12345"
    assert json.loads((tmp_path / "json").read_text()) == {"a": 1}
    assert torch.equal(load_file(tmp_path / "tensors")["a"], torch.ones(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "json", "source", "tensors"]
