"""Mathematics on tensors: alignment, assignment, decompositions, pruning, merging, search, budgets.

A solver knows tensors and functions of tensors, and no model."""
