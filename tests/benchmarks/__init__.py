"""Benchmarks: one module for each pattern, see harness.py. Run them with ``tox run -e bench``."""
