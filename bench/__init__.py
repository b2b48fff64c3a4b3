"""Benchmarks: `python -m bench cpu` measures, `python -m bench readme` writes the README's tables from results/."""
