"""Calibration: every statistic against plain loops, from disk and in memory to the same bits, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.calibration.calibrate import SAMPLE, collect, windows
from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics, Statistics
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, ModuleReader
from resmoe_kernels.python_ops.models.dense_model import DenseModel, build_on_meta
from resmoe_kernels.python_ops.models.routing import RouterChange
from tests import families, oracle

TOKENS = (torch.arange(60).view(3, 20) * 7) % 61 + 3
ROUTED = [f for f in families.CONFIGS if f not in ("switch",)]
TENSORS = [f.name for f in dataclasses.fields(LayerStatistics) if f.name not in ("tokens", "moments")]


def same(one: Statistics, other: Statistics) -> bool:
    assert one.layers.keys() == other.layers.keys() and torch.equal(one.token_ids, other.token_ids)
    pairs = [(getattr(one.layers[p], n), getattr(other.layers[p], n)) for p in one.layers for n in TENSORS]
    return all(torch.equal(a, b) for a, b in pairs) and one.origin == other.origin


def watch(model, dense: DenseModel, i: int) -> dict[str, torch.Tensor]:
    """What the router and the experts of a layer get and give while the whole model runs."""
    seen: dict[str, torch.Tensor] = {}
    found = dense.experts[i]

    def on_experts(module, positional, named):
        seen.update(zip(("x", "index", "weight"), (*positional, *named.values()), strict=True))

    hooks = [
        found.module.register_forward_pre_hook(on_experts, with_kwargs=True),
        found.router(model).register_forward_hook(lambda m, a, output: seen.update(logits=output[0])),
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_every_statistic_is_what_plain_loops_say(family, full):
    model = families.build(family)
    dense = DenseModel(model)
    collected = collect(dense, TOKENS, moments="full" if full else "diagonal", progress=False)
    for i, found in enumerate(dense.experts):
        seen, stats, experts = watch(model, dense, i), collected.layers[found.path], dense.read(i)
        x, logits = oracle.float64(seen["x"]), oracle.float64(seen["logits"])
        index, weight = seen["index"].tolist(), oracle.float64(seen["weight"])
        count, hidden, inner = experts.num_experts, experts.hidden_size, experts.intermediate_size
        want = {
            "count": np.zeros(count),
            "weight": np.zeros(count),
            "moment_down": np.zeros((count, inner, inner)),
            "output": np.zeros((count, hidden)),
            "weighted_norm": np.zeros(count),
        }
        for t, slots in enumerate(index):
            for k, e in enumerate(slots):
                h, y = by_hand(experts, e, seen["x"][t], found.activation)
                want["count"][e] += 1
                want["weight"][e] += weight[t, k]
                want["moment_down"][e] += np.outer(h, h)
                want["output"][e] += y
                want["weighted_norm"][e] += weight[t, k] * np.linalg.norm(y)
        exp = np.exp(logits - logits.max(1, keepdims=True))
        want["probability"] = (exp / exp.sum(1, keepdims=True)).sum(0)
        want["logit_gram"] = logits.T @ logits
        want["moment_gate_up"] = x.T @ x
        if not full:
            want["moment_gate_up"] = np.diag(want["moment_gate_up"])
            want["moment_down"] = np.stack([np.diag(m) for m in want["moment_down"]])
        for name, value in want.items():
            np.testing.assert_allclose(oracle.float64(getattr(stats, name)), value, rtol=2e-4, atol=1e-5, err_msg=name)
        assert stats.tokens == len(x) == 60
        for name, key in (("sample_x", "x"), ("sample_index", "index"), ("sample_logits", "logits")):
            torch.testing.assert_close(getattr(stats, name), seen[key].to(getattr(stats, name).dtype))


def by_hand(experts, e: int, x: torch.Tensor, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """h_e and f_e of one token in float64."""
    from resmoe_kernels.activations import activate

    z = experts.gate_up[e].double() @ x.double()
    if experts.bias_gate_up is not None:
        z = z + experts.bias_gate_up[e].double()
    h = activate(z.unsqueeze(0), activation, experts.gated)[0]
    y = experts.down[e].double() @ h
    if experts.bias_down is not None:
        y = y + experts.bias_down[e].double()
    return oracle.float64(h), oracle.float64(y)


@pytest.mark.parametrize("family", ROUTED)
def test_from_disk_and_in_memory_to_the_same_bits(family, tmp_path):
    families.build(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    in_memory = collect(DenseModel(model), TOKENS, progress=False)
    checkpoint = Checkpoint(tmp_path)
    meta = build_on_meta(checkpoint, False)
    dense = DenseModel(meta, ModuleReader(checkpoint, meta))
    assert same(collect(dense, TOKENS, progress=False), in_memory)
    # No layer stays: what is left in memory lies outside of them.
    assert all(p.is_meta for p in dense.decoder_layers.parameters())
    assert same(collect(dense, TOKENS, progress=False), in_memory)


def test_carried_hidden_states_are_the_models_own(tmp_path):
    model = families.build("deepseek_v2")
    dense = DenseModel(model)
    hidden = dense.embed(TOKENS)
    out = dense.run(hidden, 0, 2)
    with torch.no_grad():
        expected = model.model(TOKENS).last_hidden_state
        assert torch.equal(model.model.norm(torch.cat(out.states)), expected)
    one, both = dense.run(hidden, 0, 1), dense.run(dense.run(hidden, 0, 1), 1, 2)
    assert torch.equal(torch.cat(both.states), torch.cat(out.states))
    # A change holds for its run only.
    change = RouterChange(expert_of_slot=(0, -1, 1, 2, 3, 4, 5, 6), scoring=dense.scoring(0))
    changed = dense.run(one, 1, 2, {0: change})
    assert not torch.equal(torch.cat(changed.states), torch.cat(out.states))
    assert torch.equal(torch.cat(dense.run(one, 1, 2).states), torch.cat(out.states))
    assert "forward" not in vars(dense.decoder_layers[0])


def test_a_sample_is_spread_over_all_tokens(monkeypatch):
    monkeypatch.setattr("resmoe_kernels.python_ops.calibration.calibrate.SAMPLE", 7)
    model = families.build("mixtral")
    dense = DenseModel(model)
    stats = collect(dense, TOKENS, progress=False).layers[dense.experts[0].path]
    seen = watch(model, dense, 0)
    assert torch.equal(stats.sample_x, seen["x"][torch.tensor([0, 10, 20, 30, 39, 49, 59])])
    assert SAMPLE == 4096


def test_statistics_come_back_from_a_file(tmp_path):
    stats = collect(DenseModel(families.build("mixtral")), TOKENS, fingerprint="abc", progress=False)
    stats.save(tmp_path / "s.safetensors")
    assert same(Statistics.load(tmp_path / "s.safetensors"), stats)
    first = (tmp_path / "s.safetensors").read_bytes()
    stats.save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == first
    (tmp_path / "s.safetensors").write_bytes(first[:-100])
    with pytest.raises(ValueError, match=r"s\.safetensors: not a file of calibration statistics.*; calibrate ag"):
        Statistics.load(tmp_path / "s.safetensors")


def test_the_bundled_model_through_the_public_function(repo):
    folder = repo / "examples" / "tiny-mixtral"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = repo / "examples" / "wikitext2-excerpt.txt"
    stats = rk.calibrate(model, tokenizer, text, tokens=1100, progress=False)
    assert stats.origin["windows"] == [2, 512] and len(stats.layers) == 4
    for layer in stats.layers.values():
        assert int(layer.count.sum()) == 2 * 1024 and layer.tokens == 1024
        assert float(layer.probability.sum()) == pytest.approx(1024, rel=1e-5)


# ---- what is refused


def test_bad_input_is_named(tmp_path, repo):
    model = families.build("mixtral")
    tokenizer = AutoTokenizer.from_pretrained(repo / "examples" / "tiny-mixtral")
    text = tmp_path / "text.txt"
    text.write_text("")
    with pytest.raises(ValueError, match=r"text\.txt: calibration needs at least two tokens, got 0"):
        windows(model.config, tokenizer, text, 100)
    with pytest.raises(ValueError, match="calibration tokens: must be at least 2, got 1"):
        windows(model.config, tokenizer, text, 1)
    with pytest.raises(ValueError, match="moments: must be one of diagonal, full, experts, got 'half'"):
        collect(DenseModel(model), TOKENS, moments="half")
    with pytest.raises(ValueError, match="calibration runs decoder-only models"):
        collect(DenseModel(families.build("switch")), TOKENS)


def test_a_model_that_goes_round_its_layers_is_refused():
    model = families.build("mixtral")
    model.forward = lambda *_, **__: None
    with pytest.raises(ValueError, match=r"its forward does not call the layers of model\.layers"):
        collect(DenseModel(model), TOKENS, progress=False)
    assert "forward" not in vars(model.model.layers[0])


def test_windows_are_whole_and_as_long_as_the_model_allows(tmp_path, repo):
    tokenizer = AutoTokenizer.from_pretrained(repo / "examples" / "tiny-mixtral")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the moon " * 40)
    config = families.build("mixtral").config  # 64 positions
    assert windows(config, tokenizer, text, 200).shape == (3, 64)
    assert windows(config, tokenizer, text, 50).shape == (1, 50)


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def hands_on_chosen_keys():
    """GLM-5: a layer returns the keys its attention chose, for the layer that follows."""
    config = transformers.GlmMoeDsaConfig(
        **_SMALL,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
    )
    return transformers.GlmMoeDsaForCausalLM(config)


def is_handed_a_bias():
    config = transformers.MiniMaxM2Config(**_SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=4)
    return transformers.MiniMaxM2ForCausalLM(config)


@pytest.mark.parametrize("build", [hands_on_chosen_keys, is_handed_a_bias])
def test_layers_and_routers_that_take_more_than_hidden_states(build):
    """What experts see in calibration is what they see in the model's own forward."""
    torch.manual_seed(0)
    model = build().eval()
    dense = DenseModel(model)
    ids = (torch.arange(32).view(2, 16) % 50) + 5
    seen = {}
    for found in dense.experts:
        found.module.register_forward_pre_hook(lambda _, inputs, path=found.path: seen.update({path: inputs}))
    with torch.no_grad():
        model(ids, use_cache=False)
    own = dict(seen)
    collected = collect(dense, ids, progress=False)
    for path, (x, index, weight) in own.items():
        layer = collected.layers[path]
        torch.testing.assert_close(layer.sample_x, x, rtol=0, atol=1e-5)
        assert torch.equal(layer.sample_index.sort(-1).values, index.sort(-1).values)
        torch.testing.assert_close(layer.sample_weight.sum(-1), weight.float().sum(-1))


def test_a_layer_that_no_token_reaches_is_left_out_and_said(caplog):
    model = families.build("mixtral")
    dense = DenseModel(model)
    block = model.model.layers[1].mlp
    block.forward = lambda x: x  # as experts of images in a model that reads text
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        collected = collect(dense, torch.arange(20).view(1, 20), progress=False)
    assert list(collected.layers) == ["model.layers.0.mlp.experts"]
    assert "model.layers.1.mlp.experts: no token of the text comes there" in caplog.text
    with pytest.raises(
        ValueError, match=r"hold nothing of model\.layers\.1\.mlp\.experts; calibrate this model, or leave"
    ):
        rk.swap_experts(model, method="mc-smoe", stage="merge", statistics=collected, progress=False)


def test_what_cannot_be_watched_is_said_before_the_work(monkeypatch):
    model = families.build("mixtral")
    model.model.layers[1].mlp.gate = torch.nn.Identity()
    dense = DenseModel(model)
    monkeypatch.setattr(DenseModel, "embed", lambda *_: pytest.fail("began to work"))
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.experts: no router with 4 rows of weights beside it"
    ):
        collect(dense, torch.arange(20).view(1, 20), progress=False)


def test_a_method_that_cannot_read_the_router_says_so_before_calibration(tmp_path, monkeypatch):
    families.build("phimoe").save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("never read")
    monkeypatch.setattr("resmoe_kernels.python_ops.jobs.compress.carry_over", lambda *_: pytest.fail("began to work"))
    monkeypatch.setattr(
        "resmoe_kernels.python_ops.jobs.compress.calibration_data", lambda *_: SimpleNamespace(described={})
    )
    with pytest.raises(ValueError, match="its router, a PhimoeTopKRouter, scores in a way that is not known"):
        rk.compress(tmp_path / "dense", tmp_path / "out", method="moe-i2", calibration=text, progress=False)


def test_numbers_too_large_for_the_dtype_are_refused_by_layer():
    """Fine in float32; in float16 an expert's output is infinite, and nothing may be decided on what follows."""
    ids = torch.arange(40).view(2, 20) + 3
    model = families.build("qwen3_moe")
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts
        experts.gate_up_proj *= 300
        experts.down_proj *= 300
    collect(DenseModel(model), ids, progress=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0.*(is not finite|overflowed).*in bfloat16 or float32"):
        collect(DenseModel(model.half()), ids, progress=False)
