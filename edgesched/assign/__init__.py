"""Assignment policies: which category goes to which model."""

from edgesched.assign.policies import (
    AlwaysBest,
    AlwaysCheapest,
    Direct,
    Distributions,
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
    "Distributions",
    "GainPerSecond",
    "Joint",
    "Probabilistic",
    "Random",
    "Trained",
    "threshold_assignment",
    "train_thresholds",
]
