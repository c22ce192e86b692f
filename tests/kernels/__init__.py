"""resmoe_kernels: the weight form, the ops and the backends, each against the oracle."""
