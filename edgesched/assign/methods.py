"""Methods: an assignment policy and a search behind it; many are planned with on the same problem."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypedDict

from edgesched.equations.utility import single_best_plan
from edgesched.errors import ArgumentError, PlanError, SearchError
from edgesched.protocols import Policy, Scores, Search
from edgesched.types import Plan, Scenario, SearchResult

log = logging.getLogger(__name__)
SINGLE = "single_best"
#: Keys of the published baselines, and of what is compared with them.
BASELINES = ("direct", "random", "equal_allocation", "optimal_step")
OURS = ("published", "annealing")


class Method(TypedDict):
    """What a file of ``conf/method/`` holds."""

    assignment: Policy
    search: Search


def plan_all(
    methods: Mapping[str, Method], scenario: Scenario, scores: Scores | None, group: str = "method"
) -> dict[str, SearchResult]:
    """Plan with every method; one that cannot solve this problem is left out, with the reason.

    Args:
        methods: Name → assignment policy and search.
        scenario: What is planned for.
        scores: Fitted distributions.
        group: Where the methods stand in the configuration, for the message.

    Returns:
        Results by name, in the order of the methods.

    Raises:
        ArgumentError: If an argument of a method is wrong, whatever the problem.
        SearchError: If no method is left.
    """
    results, reason = {}, ""
    for name, method in methods.items():
        search = method["search"]
        try:
            given = method["assignment"](scenario, scores)
            results[name] = search(scenario) if given is None else search(scenario, assignment=given.detach())
        except ArgumentError as exc:
            raise ArgumentError(f"{group}.{name}: {exc}") from exc
        except (PlanError, SearchError) as exc:
            log.warning("%s is left out: %s", name, exc)
            reason = str(exc)
    if not results:
        raise SearchError(f"no method could plan for this scenario; {reason}")
    return results


def plan_policies(
    compared: Mapping[str, Policy], scenario: Scenario, scores: Scores | None, search: Search
) -> dict[str, Plan]:
    """Plan every load with every policy, and with one model for everyone; what does not fit is left out.

    Args:
        compared: Policies by name.
        scenario: Batch of loads.
        scores: Fitted distributions.
        search: Search for whatever the policy leaves open.

    Returns:
        Plans of all loads by policy, and of one model for everyone.

    Raises:
        ArgumentError: If an argument of a policy or of the search is wrong, whatever the problem.
        SearchError: If policies were given and none is left.
    """
    methods: dict[str, Method] = {name: {"assignment": policy, "search": search} for name, policy in compared.items()}
    made = plan_all(methods, scenario, scores, "policies.compare") if methods else {}
    return {SINGLE: single_best_plan(scenario)} | {name: result.plan for name, result in made.items()}
