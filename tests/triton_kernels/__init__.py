"""The Triton kernels, most of them under Triton's interpreter; mutate_triton.py plants faults in them."""
