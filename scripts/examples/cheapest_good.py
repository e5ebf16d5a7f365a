"""A policy of one's own: a callable that assigns categories to models, and ``conf/assign/cheapest_good.yaml``.

    python scripts/run.py --config-dir scripts/examples/conf +experiment=plan assign=cheapest_good
    python scripts/run.py --config-dir scripts/examples/conf +experiment=policies \\
        +assign@policies.compare.cheapest_good=cheapest_good

What to do: return probabilities of shape (B, C, M) whose rows sum to 1, or None to leave the assignment to the search.
``scores`` has the fitted distributions (:class:`edgesched.protocols.Scores`) where a mean is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgesched import Scenario
from edgesched.errors import ArgumentError
from edgesched.protocols import Scores


@dataclass(frozen=True)
class CheapestGood:
    """Each category to the cheapest model whose mean score is within some points of the best.

    A model counts with the least seconds at which it is good enough; a tie goes to the first model.

    Args:
        within: Score points that may be given up.

    Raises:
        ArgumentError: If they are negative.

    Example:
        >>> quality = [[[[20.0, 25.0], [21.0, 25.5]]]]
        >>> s = Scenario([[4.0]], quality, [1, 8], [[0.1, 1.0]], [[0.0, 0.0]], [0.5])
        >>> CheapestGood(within=1.0)(s)
        tensor([[[1., 0.]]], dtype=torch.float64)
    """

    within: float = 1.0

    def __post_init__(self) -> None:
        if not self.within >= 0:
            raise ArgumentError(f"within: expected at least 0 points, got {self.within}")

    def __call__(self, scenario: Scenario, scores: Scores | None = None) -> Tensor:
        """Probabilities, shape (B, C, M), each 0 or 1."""
        seconds = scenario.overhead_s[..., None] + scenario.step_time_s[..., None] * scenario.steps
        good = scenario.quality >= scenario.quality.amax((-2, -1), keepdim=True) - self.within
        cost = torch.where(good, seconds[:, None], torch.inf).amin(-1)
        return torch.nn.functional.one_hot(cost.argmin(-1), scenario.shape[2]).to(scenario.demand)
