"""Assignment policies: which category goes to which model."""

from edgesched.assign.methods import Method, plan_all, plan_policies
from edgesched.assign.policies import (
    AlwaysBest,
    AlwaysCheapest,
    Direct,
    GainPerSecond,
    Joint,
    Probabilistic,
    Random,
    Trained,
)
from edgesched.assign.thresholds import threshold_assignment, train_thresholds

__all__ = [
    "AlwaysBest",
    "AlwaysCheapest",
    "Direct",
    "GainPerSecond",
    "Joint",
    "Method",
    "Probabilistic",
    "Random",
    "Trained",
    "plan_all",
    "plan_policies",
    "threshold_assignment",
    "train_thresholds",
]
