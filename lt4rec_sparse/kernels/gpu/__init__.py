"""Triton kernels, and the ways in which a GPU runs a frozen network. Imported only when a GPU first needs them."""
