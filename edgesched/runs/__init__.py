"""Runs: configuration, sweeps, comparison and logging."""
