"""Slow, obvious oracles: the equations in plain Python, and brute force on tiny problems."""

import itertools
import math


def utility(scenario, b, assignment, steps, share):
    """Utility of one plan of scenario b, straight from the equations; -inf where infeasible."""
    demand = scenario.demand[b].tolist()
    options = scenario.steps.tolist()
    total = sum(demand)
    quality = latency = 0.0
    for m in range(len(steps)):
        load = sum(n * assignment[c][m] for c, n in enumerate(demand))
        if load == 0:
            continue
        for c, n in enumerate(demand):
            if n * assignment[c][m] > 0:
                q = float(scenario.quality[b, c, m, options.index(steps[m])])
                if q == -math.inf:
                    return -math.inf
                quality += n * assignment[c][m] * q
        if share[m] <= 0:
            return -math.inf
        seconds = float(scenario.overhead_s[b, m]) + steps[m] * float(scenario.step_time_s[b, m])
        if scenario.latency == "slot":
            wait = load * seconds / share[m]
        else:
            service = seconds / share[m]
            rho = load * service
            if rho >= 1:
                return -math.inf
            wait = service * (1 + rho / (2 * (1 - rho)))
        latency += load * wait
    value = quality / total - float(scenario.latency_weight[b]) * latency / total
    if scenario.share_units is not None and any(abs(f * scenario.share_units - round(f * scenario.share_units)) > 1e-6
                                                for f in share):  # fmt: skip
        return -math.inf
    if scenario.memory_gib is not None:
        loaded = [m for m in range(len(steps)) if sum(n * assignment[c][m] for c, n in enumerate(demand)) > 0]
        if sum(float(scenario.memory_gib[b, m]) for m in loaded) > float(scenario.memory_limit_gib[b]) * (1 + 1e-9):
            return -math.inf
    if scenario.deadline_s is not None and latency / total > float(scenario.deadline_s[b]) * (1 + 1e-9):
        return -math.inf
    return value


def simplex(parts, units):
    """Every way to deal ``units`` equal units to ``parts``, as fractions."""
    for cuts in itertools.combinations(range(units + parts - 1), parts - 1):
        edges = (-1, *cuts, units + parts - 1)
        yield tuple((edges[i + 1] - edges[i] - 1) / units for i in range(parts))


def brute_force(scenario, b, *, assignment=None, assign_units=4, share_units=20):
    """Best utility over a grid of assignments and shares and all step counts."""
    _, c, m, _ = scenario.shape
    rows = list(simplex(m, assign_units))
    assignments = itertools.product(rows, repeat=c) if assignment is None else [assignment]
    best = -math.inf
    for p in assignments:
        for steps in itertools.product(scenario.steps.tolist(), repeat=m):
            for share in simplex(m, share_units):
                best = max(best, utility(scenario, b, p, list(steps), share))
    return best
