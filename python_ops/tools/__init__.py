"""What a user runs on a model: diagnosis before compressing, evaluation after, the environment, an lm-eval adapter.

Tools read models and jobs; no job, method or solver knows of them."""
