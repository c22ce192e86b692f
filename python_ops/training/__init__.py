"""Training what a method left: distillation with pruning, and LoRA.

Nothing of the package needs it; it needs what compression made."""
