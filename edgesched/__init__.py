"""Differentiable scheduling of text-to-image models at the edge.

What is heavy (Lightning, diffusers, transformers, W&B) is imported by the modules that need it, when
they need it.
"""

from typing import TYPE_CHECKING, Any

from edgesched import search
from edgesched.data.table import ScoreTable
from edgesched.equations.bounds import upper_bound
from edgesched.equations.shares import best_share
from edgesched.equations.utility import evaluate, soft_utility
from edgesched.errors import EdgeschedError
from edgesched.search import solve
from edgesched.types import Outcome, Plan, PromptSet, Scenario, SearchResult

if TYPE_CHECKING:
    from edgesched.quality import QualityModel, fit_quality

__version__ = "0.2.0"
__all__ = [
    "EdgeschedError",
    "Outcome",
    "Plan",
    "PromptSet",
    "QualityModel",
    "Scenario",
    "ScoreTable",
    "SearchResult",
    "best_share",
    "evaluate",
    "fit_quality",
    "search",
    "soft_utility",
    "solve",
    "upper_bound",
]


def __getattr__(name: str) -> Any:
    if name in ("QualityModel", "fit_quality"):
        from edgesched.quality import families as quality

        return getattr(quality, name)
    raise AttributeError(f"module 'edgesched' has no attribute {name!r}")
