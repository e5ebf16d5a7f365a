"""From the best states of a chunk's restarts to its plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgesched.equations.shares import best_share
from edgesched.equations.utility import evaluate
from edgesched.search._plans import plan_at
from edgesched.search.anneal.tables import Tables
from edgesched.types import Plan


def gathered(tables: Tables, results: list[dict[str, Any]], polish: bool) -> tuple[Plan, Tensor]:
    """Plan and history of a chunk from its restarts.

    Args:
        tables: The chunk.
        results: What each restart ended with: energies (B,), states, each (rows, B), and history (records, B).
        polish: Make the shares, and where possible the assignment, optimal at the step counts found.

    Returns:
        Plan of B scenarios, and best utilities at recorded iterations, shape (records, B).
    """
    best = torch.stack([r["energy"] for r in results]).argmax(0)
    count = len(results[0]["states"])
    states = []
    for i in range(count):
        every = torch.stack([r["states"][i] for r in results])  # (restarts, rows, B)
        states.append(every.gather(0, best.expand(1, every.shape[1], -1))[0].T.contiguous())
    length = max(len(r["history"]) for r in results)
    padded = [torch.cat([h, h[-1:].expand(length - len(h), -1)]) for h in (r["history"] for r in results)]
    return _finish(tables, states, polish), torch.stack(padded).amax(0)


def _finish(tables: Tables, states: list[Tensor], polish: bool) -> Plan:
    """The plan of each scenario's best state (B, rows), its shares and where possible its assignment made optimal."""
    scenario = tables.scenario
    b, c, m, _ = scenario.shape
    parts = iter(states)
    if tables.given is not None:
        assignment = tables.given
    else:
        chosen = torch.nn.functional.one_hot(next(parts).long(), m).to(scenario.demand.dtype)
        size = tables.pieces.to(scenario.demand.dtype)
        assignment = (chosen.reshape(b, c, len(size), m) * size[:, None]).sum(-2)
    index = next(parts).long()
    steps = scenario.steps[index]
    if tables.share is not None:
        return Plan(assignment, steps, tables.share)
    if tables.units is not None and not polish:
        share = next(parts).to(scenario.demand.dtype) / tables.units
        return Plan(assignment, steps, share)
    plan = Plan(assignment, steps, best_share(scenario, assignment, steps))
    if not polish or tables.given is not None or not tables.separable:
        return plan
    other = plan_at(scenario, index)
    better = evaluate(scenario, other).utility > evaluate(scenario, plan).utility
    return Plan(
        torch.where(better[:, None, None], other.assignment, plan.assignment),
        steps,
        torch.where(better[:, None], other.share, plan.share),
    )
