"""Compressing a checkpoint or a model: compress, its workers and memory, the swap."""
