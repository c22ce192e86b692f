"""transformers: families, checkpoints, loading, routers."""
