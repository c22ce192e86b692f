"""What a user runs: the command line, diagnose, evaluate, environment, lm-eval."""
