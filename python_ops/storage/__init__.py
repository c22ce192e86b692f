"""Files: which of a folder are a model, what they hold, and how they are written so that they survive.

Here nobody knows what a tensor is for."""
