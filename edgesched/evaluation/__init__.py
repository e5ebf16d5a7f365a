"""Evaluation: replay on held-out prompts, and how robust decisions are."""
