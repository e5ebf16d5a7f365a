"""Data: prompts, score tables, their sources, and how files are read and written."""
