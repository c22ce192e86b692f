"""``python -m resmoe_kernels``: the same command line as ``resmoe``."""

from resmoe_kernels.python_ops.cli import main

main()
