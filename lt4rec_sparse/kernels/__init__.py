"""Kernels, each held against `reference`, the specification. Reached through `lt4rec_sparse.ops` only."""
