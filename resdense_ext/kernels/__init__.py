"""Triton kernels and their launchers. Nothing here is imported before a kernel is wanted: Triton is optional."""
