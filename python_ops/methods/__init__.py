"""Compression methods: one file a published system, what all share in method.py, how one is found in named.py.

From the dense experts of one layer to FactoredExperts, a change of its router and a report."""
