"""Statistics of a model on a text."""
