"""Search methods: one signature ``(scenario, *, assignment=None, ...)``, one result type."""

from edgesched.search.anneal import Cooling, Progress, Stopping, anneal
from edgesched.search.baselines import equal_allocation, optimal_step
from edgesched.search.branch import branch
from edgesched.search.coordinate import coordinate
from edgesched.search.exact import exact
from edgesched.search.random_search import random_search
from edgesched.search.relax import relax
from edgesched.search.solve import solve
from edgesched.search.tree import tree

__all__ = [
    "Cooling",
    "Progress",
    "Stopping",
    "anneal",
    "branch",
    "coordinate",
    "equal_allocation",
    "exact",
    "optimal_step",
    "random_search",
    "relax",
    "solve",
    "tree",
]
