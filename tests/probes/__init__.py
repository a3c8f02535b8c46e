"""Probes: what each library does where it matters, see harness.py; run by ``tox run -e probe``."""
