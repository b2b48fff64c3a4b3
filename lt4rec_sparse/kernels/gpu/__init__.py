"""Triton kernels and the ways to run a frozen network on a GPU. Imported only where Triton is."""
