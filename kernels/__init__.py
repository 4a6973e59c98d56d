"""Kernels of this project, installed as `compress_kernels`; each operation has a torch reference that defines it."""
