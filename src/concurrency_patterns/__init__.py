"""Concurrency patterns for Python that hold under cancellation, failure and load."""
