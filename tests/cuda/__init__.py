"""The CUDA kernels on an emulation of CUDA (tests/cpp); mutate_cuda.py plants faults in them."""
