"""The Triton kernels of ``resmoe::experts``: few tokens in decode.py, many in prefill.py, and what both share.

Nothing here can be imported without triton. ``experts`` is the op; ``declines`` says what it leaves to others.
"""
