"""What a user would pick instead, on the same scenarios: scipy, simanneal, a numba loop and an integer program.

Each solves one scenario at a time in slot mode. A plan is one step count per model and, where the assignment is free, one
model per category; shares follow in closed form, so that every method searches the same space as ours, but for
mixed assignments, which only ours and the integer program use.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from edgesched.equations.utility import quality_by_step
from edgesched.search._result import checked_assignment
from edgesched.types import Scenario


@dataclass(frozen=True)
class Instance:
    """One scenario as numpy arrays; ``gain`` (M, K) and ``load`` (M,) only where the assignment is given."""

    quality: np.ndarray
    root: np.ndarray
    demand: np.ndarray
    weight: float
    gain: np.ndarray | None
    load: np.ndarray | None

    @classmethod
    def of(cls, scenario: Scenario, b: int, assignment: Tensor | None = None) -> "Instance":
        """Scenario ``b`` of a batch."""
        service = scenario.overhead_s[b, :, None] + scenario.step_time_s[b, :, None] * scenario.steps
        gain = load = None
        if assignment is not None:
            one = scenario[b]
            given = checked_assignment(one, assignment[b : b + 1])
            assert given is not None
            gain = quality_by_step(one, given)[0].numpy()
            load = (one.demand[..., None] * given).sum(1)[0].numpy()
        return cls(scenario.quality[b].numpy(), service.sqrt().numpy(), scenario.demand[b].numpy(),
                   float(scenario.latency_weight[b]), gain, load)  # fmt: skip

    def utility(self, steps: np.ndarray, models: np.ndarray) -> float:
        """Utility of step positions (M,) and, where the assignment is free, models of categories (C,)."""
        total = self.demand.sum()
        every = np.arange(len(steps))
        if self.gain is not None and self.load is not None:
            cost = (self.load * self.root[every, steps]).sum()
            return float((self.gain[every, steps].sum() - self.weight * cost**2) / total)
        chosen = steps[models]
        gain = (self.demand * self.quality[np.arange(len(models)), models, chosen]).sum()
        cost = (self.demand * self.root[models, chosen]).sum()
        return float((gain - self.weight * cost**2) / total)


def dual_annealing(instance: Instance, seed: int, scale: int = 1000) -> tuple[float, int]:
    """``scipy.optimize.dual_annealing`` at its defaults over rounded variables; utility, evaluations."""
    from scipy.optimize import dual_annealing as solve

    _, m, k = instance.quality.shape
    categories = 0 if instance.gain is not None else len(instance.demand)
    bounds = [(0, k - 1e-9)] * m + [(0, m - 1e-9)] * categories

    def lost(x: np.ndarray) -> float:
        whole = x.astype(np.int64)
        return -instance.utility(whole[:m], whole[m:])

    found = solve(lost, bounds, maxiter=scale, rng=np.random.default_rng(seed))
    return -float(found.fun), int(found.nfev)


def simanneal(instance: Instance, seed: int, scale: int = 20_000) -> tuple[float, int]:
    """``simanneal.Annealer`` with the moves of our annealing; temperatures from its own ``auto`` would double the time."""
    from simanneal import Annealer

    c, m, k = instance.quality.shape
    joint = instance.gain is None
    rng = random.Random(seed)

    class Schedule(Annealer):
        copy_strategy = "method"
        steps, updates, Tmax, Tmin = scale, 0, 5.0, 5e-4

        def move(self) -> None:
            if joint and rng.random() < 0.5:
                self.state[m + rng.randrange(c)] = rng.randrange(m)
            else:
                self.state[rng.randrange(m)] = rng.randrange(k)

        def energy(self) -> float:
            return -instance.utility(self.state[:m], self.state[m:])

    random.seed(seed)
    first = np.array([rng.randrange(k) for _ in range(m)] + [rng.randrange(m) for _ in range(c if joint else 0)])
    _, energy = Schedule(first).anneal()
    return -float(energy), scale


_compiled: dict[str, Callable[..., float]] = {}


def _loops() -> dict[str, Callable[..., float]]:
    """Compile the loops once; numba is an optional extra."""
    if _compiled:
        return _compiled
    import numba

    @numba.njit(cache=False, fastmath=True)
    def given(
        gain: np.ndarray,
        cost: np.ndarray,
        weight: float,
        chains: int,
        iterations: int,
        seed: int,
        hot: float,
        cold: float,
    ) -> float:
        np.random.seed(seed)
        m, k = gain.shape
        top = -1e300
        for _ in range(chains):
            state = np.empty(m, np.int64)
            quality = load = 0.0
            for i in range(m):
                state[i] = np.random.randint(k)
                quality += gain[i, state[i]]
                load += cost[i, state[i]]
            energy = quality - weight * load * load
            temperature = hot
            factor = (cold / hot) ** (1.0 / iterations)
            for _ in range(iterations):
                i = np.random.randint(m)
                j = np.random.randint(k)
                q = quality + gain[i, j] - gain[i, state[i]]
                s = load + cost[i, j] - cost[i, state[i]]
                new = q - weight * s * s
                if new >= energy or np.random.random() < math.exp((new - energy) / temperature):
                    state[i], quality, load, energy = j, q, s, new
                    top = max(top, energy)
                temperature *= factor
        return top

    @numba.njit(cache=False, fastmath=True)
    def joint(quality: np.ndarray, root: np.ndarray, demand: np.ndarray, weight: float, chains: int, iterations: int,
              seed: int, hot: float, cold: float) -> float:  # fmt: skip
        np.random.seed(seed)
        c, m, k = quality.shape
        top = -1e300
        for _ in range(chains):
            state: Any = np.random.randint(0, k, m)
            models: Any = np.random.randint(0, m, c)
            gain = load = 0.0
            for i in range(c):
                gain += demand[i] * quality[i, models[i], state[models[i]]]
                load += demand[i] * root[models[i], state[models[i]]]
            energy = gain - weight * load * load
            temperature = hot
            factor = (cold / hot) ** (1.0 / iterations)
            for _ in range(iterations):
                q, s = gain, load
                moved = np.random.random() < 0.5
                i, j = 0, 0
                if moved:
                    i, j = np.random.randint(c), np.random.randint(m)
                    old = models[i]
                    q += demand[i] * (quality[i, j, state[j]] - quality[i, old, state[old]])
                    s += demand[i] * (root[j, state[j]] - root[old, state[old]])
                else:
                    i, j = np.random.randint(m), np.random.randint(k)
                    for n in range(c):
                        if models[n] == i:
                            q += demand[n] * (quality[n, i, j] - quality[n, i, state[i]])
                            s += demand[n] * (root[i, j] - root[i, state[i]])
                new = q - weight * s * s
                if new >= energy or np.random.random() < math.exp((new - energy) / temperature):
                    if moved:
                        models[i] = j
                    else:
                        state[i] = j
                    gain, load, energy = q, s, new
                    top = max(top, energy)
                temperature *= factor
        return top

    _compiled.update(given=given, joint=joint)
    return _compiled


def numba_loop(instance: Instance, seed: int, scale: int = 20_000, chains: int = 4) -> tuple[float, int]:
    """The same annealing as a plain loop, one thread; utility, proposals."""
    loops, total = _loops(), instance.demand.sum()
    if instance.gain is not None and instance.load is not None:
        cost = instance.load[:, None] * instance.root
        top = loops["given"](instance.gain, cost, instance.weight, chains, scale, seed, 5 * total, 5e-4 * total)
    else:
        top = loops["joint"](instance.quality, instance.root, instance.demand, instance.weight, chains, scale, seed,
                             5 * total, 5e-4 * total)  # fmt: skip
    return float(top / total), chains * scale


def numba_speed(instances: Sequence[Instance], chains: int, iterations: int) -> float:
    """Proposals a second of the loop over many scenarios and chains, single-threaded, compiled beforehand."""
    numba_loop(instances[0], 0, 10, 1)
    started = time.perf_counter()
    for i, instance in enumerate(instances):
        numba_loop(instance, i, iterations, chains)
    return len(instances) * chains * iterations / (time.perf_counter() - started)


def integer_program(instance: Instance, seconds: float = 60.0, tangents: int = 64) -> tuple[float, float, int]:
    """HiGHS on an outer linearisation: z_mk chooses step counts, p_cmk ≤ z_mk routes, and S² is met from below.

    S² ≥ 2 x_j S − x_j² for every x_j (tangents of a parabola), so that the program's optimum is an upper bound on the
    utility; its plan is scored by the true objective. With tangents on a geometric grid of S whose neighbours differ by
    the factor r, S² is understated by at most the share ((r − 1)/(r + 1))² (2e-3 of the latency term at 64 tangents).

    Returns:
        Utility of the plan, upper bound of the program (nan at the time limit without one), nodes opened.
    """
    import highspy
    from scipy.sparse import coo_array

    c, m, k = instance.quality.shape
    total = instance.demand.sum()
    gain, given = instance.gain, instance.load
    joint = gain is None
    z = m * k
    p = c * m * k if joint else 0
    columns = z + p + 1
    objective = np.zeros(columns)
    objective[-1] = -instance.weight / total
    load = np.zeros(columns)
    if gain is None or given is None:
        objective[z:-1] = (instance.demand[:, None, None] * instance.quality).ravel() / total
        load[z:-1] = (instance.demand[:, None, None] * instance.root[None]).ravel()
        low, high = total * instance.root.min(), total * instance.root.max()
    else:
        objective[:z] = gain.ravel() / total
        load[:z] = (given[:, None] * instance.root).ravel()
        low = (given * instance.root.min(1)).sum()
        high = (given * instance.root.max(1)).sum()
    rows: list[np.ndarray] = []
    cols: list[np.ndarray] = []
    values: list[np.ndarray] = []
    below: list[float] = []
    above: list[float] = []

    def add(at: np.ndarray, with_: np.ndarray, least: float, most: float) -> None:
        rows.append(np.full(len(at), len(below)))
        cols.append(at)
        values.append(with_)
        below.append(least)
        above.append(most)

    for i in range(m):
        add(np.arange(i * k, (i + 1) * k), np.ones(k), 1.0, 1.0)
    for i in range(c if joint else 0):
        add(z + np.arange(i * m * k, (i + 1) * m * k), np.ones(m * k), 1.0, 1.0)
        for j in range(m * k):
            add(np.array([z + i * m * k + j, j]), np.array([1.0, -1.0]), -np.inf, 0.0)
    loaded = np.flatnonzero(load)
    for x in np.geomspace(max(low, 1e-9), high, tangents):
        add(np.append(loaded, columns - 1), np.append(2 * x * load[loaded], -1.0), -np.inf, x * x)
    matrix = coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(cols))),
                       shape=(len(below), columns)).tocsc()  # fmt: skip
    model = highspy.HighsModel()
    lp = model.lp_
    lp.num_col_, lp.num_row_ = columns, len(below)
    lp.col_cost_ = objective
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_lower_ = np.zeros(columns)
    lp.col_upper_ = np.append(np.ones(columns - 1), np.inf)
    lp.row_lower_, lp.row_upper_ = np.array(below), np.array(above)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    whole, free = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    lp.integrality_ = [whole] * z + [free] * (p + 1)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", float(seconds))
    solver.setOptionValue("mip_rel_gap", 1e-6)
    solver.passModel(model)
    solver.run()
    info = solver.getInfo()
    solution = np.array(solver.getSolution().col_value)
    if len(solution) != columns or not np.isfinite(info.mip_dual_bound):
        return -math.inf, math.nan, 0
    steps = solution[:z].reshape(m, k).argmax(1)
    if not joint:
        return float(instance.utility(steps, np.zeros(0, np.int64))), float(info.mip_dual_bound), info.mip_node_count
    routed = solution[z:-1].reshape(c, m, k)
    routed = routed[:, np.arange(m), steps].clip(min=0)
    routed = routed / routed.sum(1, keepdims=True).clip(min=1e-12)
    routed_gain = (instance.demand[:, None] * routed * instance.quality[:, np.arange(m), steps]).sum()
    cost = (instance.demand[:, None] * routed * instance.root[np.arange(m), steps]).sum()
    return float((routed_gain - instance.weight * cost**2) / total), float(info.mip_dual_bound), info.mip_node_count
