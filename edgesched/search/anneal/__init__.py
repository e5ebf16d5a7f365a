"""Annealing: many chains at once, batched and vectorised."""

from edgesched.search.anneal.annealing import Progress, anneal

__all__ = ["Progress", "anneal"]
