"""Benchmarks: measured, never asserted. `python -m bench.bench_model --help`."""
