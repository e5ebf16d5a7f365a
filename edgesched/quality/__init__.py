"""Quality: score distributions per model, category and step count, learned from score tables."""

from edgesched.quality.families import (
    FAMILIES,
    GaussianQuality,
    QuantilesQuality,
    SkewNormalQuality,
    StudentTQuality,
    fit_quality,
    shared_strength,
)
from edgesched.quality.model import QualityModel, observations

__all__ = [
    "FAMILIES",
    "GaussianQuality",
    "QualityModel",
    "QuantilesQuality",
    "SkewNormalQuality",
    "StudentTQuality",
    "fit_quality",
    "observations",
    "shared_strength",
]
