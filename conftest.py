"""Every program of the pages is a test: see ``tests/docs/proof.py``."""

pytest_plugins = ["proof"]
