"""Triton kernels, one file per op; they know no autograd and register nothing."""
