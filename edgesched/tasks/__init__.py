"""Tasks: what `scripts/run.py` can be asked for."""
