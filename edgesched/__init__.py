"""Differentiable scheduling of text-to-image models at the edge."""

from edgesched.types import Outcome, Plan, PromptSet, Scenario, SearchResult

__version__ = "0.1.0"
__all__ = ["Outcome", "Plan", "PromptSet", "Scenario", "SearchResult"]
