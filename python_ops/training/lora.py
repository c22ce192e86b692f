"""Fine-tuning of a compressed model by low-rank adapters, through peft, merged back into it at the end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer, check_learns

_TRAINED = ("base", "u", "v")  # of an experts layer, for both matrices; sparse values have no rows and columns


def fine_tune(
    model: nn.Module,
    token_ids: Tensor,
    *,
    steps: int,
    windows_per_step: int = 8,
    rank: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Trains adapters of a compressed model's attention and experts to predict text, and adds them to its weights.

        W <- W + (scale / rank) B A,   scale = 2 rank,   for every projection of attention and every factor U, V or base

    An adapter of U (R, N) or V (R, K) is one for all experts of a layer: A is shared by them, B has rows for each.
    Ranks, routers and embeddings stay as they are; AdamW, its rate falling to 0 in a straight line. Experts run by the
    differentiable reference while they are trained, and by the op again afterwards; ``save_pretrained`` then writes
    the tuned checkpoint.

    model: a causal language model of transformers with factored experts, changed in place. Adapters are in
        float32 and are rounded to the model's dtype when they are added
    token_ids: (windows, L) int64; every step takes ``windows_per_step`` of them, in a random order, around again
        once all were seen
    Returns the loss of every step, before that step.

    Memory beside the model: activations of the windows of a step, and a copy of the factors of each layer.
    Raises ValueError if there are no factored experts, no windows, a number is out of range, or peft is missing.
    Source: MoE-I2, arXiv 2411.01016, which tunes two epochs of Alpaca by LoRA (arXiv 2106.09685).
    """
    named = {path: m for path, m in model.named_modules() if isinstance(m, FactoredExpertsLayer)}
    if not named:
        raise ValueError(f"{type(model).__name__}: holds no factored experts; compress it first")
    check_learns(named)
    layers = list(named.values())
    if token_ids.dim() != 2 or not len(token_ids) or token_ids.shape[1] < 2:
        raise ValueError(f"token_ids: must be (windows, L) with L of 2 or more, got {tuple(token_ids.shape)}")
    for name, number in (("steps", steps), ("windows_per_step", windows_per_step), ("rank", rank)):
        if number < 1:
            raise ValueError(f"{name}: must be at least 1, got {number}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: must be above 0, got {learning_rate}")
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ValueError(
            'peft: fine-tuning needs it, it is not installed; run: pip install "resmoe_kernels[finetune]"'
        ) from error

    for layer in layers:
        layer.make_differentiable(train=False)
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_attention_projections(model),
        target_parameters=_factors(model),
    )
    with torch.random.fork_rng():  # peft draws A from the global generator
        torch.manual_seed(seed)
        tuned = get_peft_model(model, config).eval()  # eval: routers of some models are random in training
    losses = _train(tuned, token_ids, steps, windows_per_step, learning_rate, seed, progress)
    tuned.merge_and_unload()
    for parameter, required in trains.items():
        parameter.requires_grad_(required)
    for layer in layers:
        layer.end_training()
    return losses


def _train(
    model: nn.Module,
    token_ids: Tensor,
    steps: int,
    windows_per_step: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> list[float]:
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    windows = _windows(len(token_ids), windows_per_step, seed)
    losses = []
    with tqdm(total=steps, desc="fine-tuning", unit="step", disable=not progress) as bar:
        for _ in range(steps):
            ids = token_ids[next(windows)].to(adapters[0].device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            bar.update()
    return losses


def _windows(count: int, per_step: int, seed: int) -> Iterator[Tensor]:
    """Numbers of windows, ``per_step`` at a time, in a new random order every time round."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < per_step:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:per_step]
        order = order[per_step:]


def _attention_projections(model: nn.Module) -> list[str]:
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [path for path in linears if any("attn" in part or "attention" in part for part in path.split("."))]


def _factors(model: nn.Module) -> list[str]:
    return [
        f"{path}.{part}_{matrix}"
        for path, layer in model.named_modules()
        if isinstance(layer, FactoredExpertsLayer)
        for matrix in ("gate_up", "down")
        for part in _TRAINED
        if (factor := getattr(layer, f"{part}_{matrix}")) is not None and factor.numel()
    ]
