"""Factored checkpoints in lm-eval: importing this module registers the model ``resmoe``.

    python -m resmoe_kernels.python_ops.tools.lm_eval_model run --model resmoe \\
        --model_args pretrained=FOLDER --tasks piqa

is lm-eval's own command line with that model in it. lm-eval, and accelerate, come with the extra ``eval``.
"""

from __future__ import annotations

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

# Registers the quantizer without which from_pretrained cannot load a factored checkpoint.
import resmoe_kernels  # noqa: F401


@register_model("resmoe")
class ResMoELM(HFLM):
    """lm-eval's Hugging Face model, able to load factored checkpoints.

    pretrained: folder of a checkpoint, factored or plain, or a model that is already loaded
    device: by default "cuda" where there is one and "cpu" elsewhere (lm-eval's default is "cuda" everywhere)
    options: those of ``lm_eval.models.huggingface.HFLM``
    """

    def __init__(self, pretrained, device: str | None = None, **options) -> None:
        super().__init__(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)


if __name__ == "__main__":
    cli_evaluate()
