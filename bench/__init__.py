"""Benchmarks: measured, never asserted. README.md lists the commands."""
