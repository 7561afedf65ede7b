"""Measurements. Each is a script: `python -m bench.NAME --help`."""
