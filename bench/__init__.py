"""Benchmarks: `python -m bench cpu` measures, `python -m bench tables` writes the tables of README.md and docs/."""
