"""The scripts of benchmarks/: what they measure with, and what they report."""
