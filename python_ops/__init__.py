"""The models storey: compression methods, checkpoints, the swap of expert modules, evaluation, the command line."""
