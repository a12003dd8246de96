"""Measurements of what the library claims. `python -m benchmarks --help`."""
