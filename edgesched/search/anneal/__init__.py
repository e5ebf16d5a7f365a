"""Annealing: many chains at once, batched and vectorised."""

from edgesched.search.anneal.annealing import Progress, anneal
from edgesched.search.anneal.schedule import Cooling, Stopping

__all__ = ["Cooling", "Progress", "Stopping", "anneal"]
