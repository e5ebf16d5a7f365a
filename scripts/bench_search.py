"""Search methods side by side on the same scenarios: `python scripts/bench_search.py [--quick] [--json FILE]`.

Sections (`--only ratios,joint,single,peers,scaling`):

- ratios: proposals a second of compiled annealing over eager and over a numba loop of the same move (64 scenarios ×
  1024 chains, M = 3, K = 50, assignment given); seconds of scipy's dual_annealing over ours for 64 scenarios, every gap of
  ours to the proven optimum at most 1e-4.
- joint: annealing on Scenario.random(256, categories=16, models=8, steps=50), after compilation.
- single: es.solve on one scenario, warm, against the best that any method finds.
- peers: every method and peer, joint and with the assignment given, with gaps to the proven optimum.
- scaling: seconds a scenario as models, categories, step counts and batch grow.
- many: on ``--device`` (a GPU if there is one), proposals a second as the number of chains grows, and 100,000 scenarios
  (joint on a CPU: 4,096) of C = 4, M = 3, K = 50 annealed until every gap to the proven optimum is at most 0.1 %.

Compilation is never counted. What a machine shared with others measures varies: ratios come from one run, in turn.
"""

import argparse
import inspect
import json
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import search_peers as peers
import torch
from bench_search_figures import draw
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import edgesched as es
from edgesched.equations.bounds import regret

T = TypeVar("T")
Tell = Callable[[str], None]
CLOSE = 1e-3
CONFIDENCE = 0.99
SECTIONS = ("ratios", "joint", "single", "peers", "scaling", "many")
COMPILES = "compile" in inspect.signature(es.search.anneal).parameters


def anneal(
    scenario: es.Scenario,
    assignment: Tensor | None = None,
    chains: int = 64,
    iterations: int = 1000,
    seed: int = 0,
    compiled: bool | None = None,
) -> es.SearchResult:
    """Our annealing; ``compiled`` is left out where this version cannot choose."""
    if COMPILES:
        return es.search.anneal(scenario, assignment=assignment, chains=chains, iterations=iterations, seed=seed,
                                compile=compiled)  # fmt: skip
    return es.search.anneal(scenario, assignment=assignment, chains=chains, iterations=iterations, seed=seed)


def drawn_assignment(scenario: es.Scenario, seed: int = 0) -> Tensor:
    """Assignments that prefer some models: cubes of uniform numbers, rows made to sum to 1."""
    uniform = torch.rand(scenario.shape[1:3], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = (uniform**3 + 1e-6).expand(scenario.shape[:3])
    return rows / rows.sum(-1, keepdim=True)


def timed(work: Callable[..., T]) -> tuple[T, float]:
    """Result and seconds of a call."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def peak_gib(work: Callable[..., T]) -> tuple[T, float, float]:
    """Result, seconds, and how far resident memory rose during a call, sampled every 5 ms."""
    page, most, done = os.sysconf("SC_PAGE_SIZE"), [0], threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page if Path("/proc/self/statm").exists() else 0

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident())

    before = resident()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result, seconds = timed(work)
    done.set()
    watcher.join()
    return result, seconds, max(most[0] - before, 0) / 2**30


def distance(best: Tensor, utility: Tensor) -> Tensor:
    """(best − utility) / max(|best|, 1)."""
    return (best - utility) / best.abs().clamp(min=1)


def ratios(quick: bool, tell: Tell) -> dict[str, Any]:
    """Speed of the annealing step, and of annealing against scipy."""
    batch, chains, iterations = (8, 64, 50) if quick else (64, 1024, 3000)
    scenario = es.Scenario.random(batch, seed=1)
    given = drawn_assignment(scenario)
    speed = {}
    for name, compiled, count in (("compiled", True, iterations), ("eager", False, max(20, iterations // 10))):
        anneal(scenario, given, chains, count, compiled=compiled)
        runs = [anneal(scenario, given, chains, count, seed=i, compiled=compiled) for i in range(1 if quick else 3)]
        speed[name] = max(r.proposals / r.elapsed_s for r in runs)
        tell(f"{name}: {speed[name]:.3g} proposals/s")
    instances = [peers.Instance.of(scenario, b, given) for b in range(batch)]
    speed["numba"] = peers.numba_speed(instances, chains // 16, iterations)
    exact = es.search.exact(scenario, assignment=given).utility
    ours: dict[str, Any] = {}
    for size, count in ((8, 100), (16, 200), (32, 300), (64, 500), (64, 1000), (128, 2000), (256, 4000)):
        tries = [anneal(scenario, given, size, count) for _ in range(3)]
        worst = max(float(distance(exact, r.utility).max()) for r in tries)
        seconds = min(r.elapsed_s for r in tries)
        ours = {"chains": size, "iterations": count, "seconds": seconds, "gap_worst": worst}
        if worst <= 1e-4:
            break
    few = instances[: 2 if quick else batch]
    found = [timed(lambda i=i, x=x: peers.dual_annealing(x, i)) for i, x in enumerate(few)]
    theirs = sum(s for _, s in found) * batch / len(few)
    lost = max(float(distance(exact[i], torch.tensor(u))) for i, ((u, _), _) in enumerate(found))
    return {
        "compiled_vs_eager": speed["compiled"] / speed["eager"],
        "compiled_vs_numba": speed["compiled"] / speed["numba"],
        "dual_annealing_vs_anneal": theirs / ours["seconds"],
        "proposals_per_s": speed,
        "anneal": ours,
        "dual_annealing": {"seconds": theirs, "gap_worst": lost, "measured": len(few)},
        "scenarios": batch,
        "chains": chains,
        "compile_argument": COMPILES,
    }


def joint(quick: bool, tell: Tell) -> dict[str, Any]:
    """Annealing by itself on the joint problem, against three bounds: reported, plain dual, and as far as proven."""
    batch, chains, iterations = (6, 16, 300) if quick else (256, 64, 4000)
    scenario = es.Scenario.random(batch, categories=16, models=8, steps=50)
    anneal(scenario, None, chains, 20)
    result = anneal(scenario, None, chains, iterations)
    tell(f"annealing: {result.elapsed_s:.1f} s")
    proof, seconds = timed(lambda: es.search.branch(scenario, nodes=64 if quick else 200))
    plain = es.upper_bound(scenario, nodes=1)
    climbed = es.search.coordinate(scenario)

    def against(bound: Tensor, utility: Tensor) -> dict[str, float]:
        lost = distance(bound, utility)
        return {"gap_median": float(lost.median()), "gap_worst": float(lost.max()),
                "regret_median": float(regret(scenario, bound, utility).median())}  # fmt: skip

    return {
        **against(result.bound, result.utility),
        "seconds": result.elapsed_s,
        "scenarios": batch,
        "chains": chains,
        "iterations": iterations,
        "plain_dual": against(plain, result.utility),
        "proven": against(proof.bound, result.utility),
        "coordinate": {**against(climbed.bound, climbed.utility), "seconds": climbed.elapsed_s},
        "branch": {**against(proof.bound, proof.utility), "seconds": seconds},
    }


def single(quick: bool, tell: Tell) -> dict[str, Any]:
    """es.solve on one scenario at a time, warm, joint and with the assignment given."""
    count, repeats, budget = (1, 3, 3.0) if quick else (4, 20, 60.0)
    scenarios = es.Scenario.random(count, categories=16, models=8, steps=50, seed=7)
    rows: list[dict[str, Any]] = []
    for b in range(count):
        one = scenarios[b]
        es.solve(one)
        result = es.solve(one)
        times = [timed(lambda one=one: es.solve(one))[1] for _ in range(repeats)]
        best, by = _best_of_all(one, budget / count)
        gap = float(distance(best, result.utility)[0])
        rows.append({"method": result.method, "gap": max(gap, 0.0), "milliseconds": 1e3 * statistics.median(times),
                     "milliseconds_worst": 1e3 * max(times), "certified_gap": float(result.gap[0]), "best": by})  # fmt: skip
        tell(f"scenario {b}: {rows[-1]['milliseconds']:.0f} ms, {100 * rows[-1]['gap']:.4f} % from the best ({by})")
    given = drawn_assignment(scenarios)
    fixed = []
    for b in range(count):
        one, p = scenarios[b], given[b : b + 1]
        result = es.solve(one, assignment=p)
        times = [timed(lambda one=one, p=p: es.solve(one, assignment=p))[1] for _ in range(repeats)]
        best = es.search.exact(one, assignment=p).utility
        fixed.append((float(distance(best, result.utility)[0]), 1e3 * statistics.median(times), result.method))
    return {
        "method": rows[0]["method"],
        "gap": max(r["gap"] for r in rows),
        "milliseconds": statistics.median(r["milliseconds"] for r in rows),
        "certified_gap": max(r["certified_gap"] for r in rows),
        "each": rows,
        "given": {"method": fixed[0][2], "gap": max(f[0] for f in fixed),
                  "milliseconds": statistics.median(f[1] for f in fixed)},
    }  # fmt: skip


def _best_of_all(one: es.Scenario, seconds: float) -> tuple[Tensor, str]:
    """Best utility that any method finds for one scenario within about ``seconds``, and whose it is."""
    tries = {
        "branch": lambda: es.search.branch(one, nodes=1_000_000, tolerance=0.0, max_seconds=seconds / 3),
        "coordinate": lambda: es.search.coordinate(one, starts=32),
        "relax": lambda: es.search.relax(one),
        "tree": lambda: es.search.tree(one, iterations=600),
        "anneal": lambda: anneal(one, None, 256, 2000),
    }
    started, by = time.perf_counter(), ""
    best: Tensor | None = None
    for name, work in tries.items():
        if best is not None and time.perf_counter() - started > seconds:
            break
        utility = work().utility
        if best is None or bool(utility > best + 1e-9):
            best, by = utility, name
    assert best is not None
    return best, by


def ours(name: str, scenario: es.Scenario, given: Tensor | None, seed: int = 0) -> es.SearchResult:
    """One of our methods at its defaults."""
    if name == "anneal":
        return anneal(scenario, given, seed=seed)
    search = getattr(es.search, name)
    found: es.SearchResult = search(scenario, assignment=given, seed=seed)
    return found


OURS = ("solve", "exact", "branch", "coordinate", "relax", "anneal", "tree", "random_search")


def compare(quick: bool, tell: Tell) -> dict[str, Any]:
    """Every method and peer on the same scenarios."""
    batches = (1, 4, 16) if quick else (1, 64, 4096)
    sizes: dict[str, dict[str, Any]]
    sizes = {"given": {"categories": 4, "models": 3}, "joint": {"categories": 16, "models": 8}}
    if quick:
        sizes["joint"] = {"categories": 6, "models": 4, "steps": 20}
    limit = 5.0 if quick else 30.0
    table = []
    for problem, size in sizes.items():
        scenario = es.Scenario.random(batches[-1], **size, seed=3)
        given = drawn_assignment(scenario) if problem == "given" else None
        some = slice(0, batches[1])
        exact = es.search.branch(scenario[some], assignment=_part(given, some), nodes=2000, tolerance=0.0)
        best = torch.minimum(exact.bound, exact.utility + 1e-9 * exact.utility.abs())
        for name in OURS:
            table.append(_row(problem, name, scenario, given, batches, best, limit))
            tell(f"{problem}: {name} {1e3 * table[-1]['seconds'][1]:.2f} ms a scenario")
        for work in (peers.dual_annealing, peers.simanneal, peers.numba_loop, peers.integer_program):
            table.append(_peer_row(problem, work, scenario, given, best, 2 if quick else 8, quick))
            tell(f"{problem}: {work.__name__} {table[-1]['seconds'][0]:.3f} s a scenario")
    return {"batches": batches, "rows": table, "curves": _curves(quick)}


def _part(given: Tensor | None, rows: slice) -> Tensor | None:
    return None if given is None else given[rows]


def _row(
    problem: str,
    name: str,
    scenario: es.Scenario,
    given: Tensor | None,
    batches: Sequence[int],
    best: Tensor,
    limit: float,
) -> dict[str, Any]:
    """Times at every batch, gaps at the middle one."""
    one = [timed(lambda b=b: ours(name, scenario[b], _part(given, slice(b, b + 1)))) for b in (0, 0, 1, 2)][1:]
    seconds: list[float | None] = [statistics.median(s for _, s in one)]
    middle = slice(0, batches[1])
    result, wall, memory = peak_gib(lambda: ours(name, scenario[middle], _part(given, middle)))
    seconds.append(wall / batches[1])
    if wall * batches[2] / batches[1] <= limit:
        _, whole, memory = peak_gib(lambda: ours(name, scenario, given))
        seconds.append(whole / batches[2])
    else:
        seconds.append(None)
    lost = distance(best, result.utility).clamp(min=0)
    return _filled(problem, name, seconds, lost.numpy(), result.proposals / max(result.elapsed_s, 1e-9), memory)


def _peer_row(
    problem: str,
    work: Callable[..., Any],
    scenario: es.Scenario,
    given: Tensor | None,
    best: Tensor,
    count: int,
    quick: bool,
) -> dict[str, Any]:
    """A peer on ``count`` scenarios, one after the other, which is all it can do."""
    instances = [peers.Instance.of(scenario, b, given) for b in range(count)]
    if work is peers.numba_loop:
        work(instances[0], 0, 10, 1)
    lost, times, proposals, spent = [], [], 0, time.perf_counter()
    for b, instance in enumerate(instances):
        if work is peers.integer_program:
            if b and time.perf_counter() - spent > (5 if quick else 45):
                break
            (utility, _, done), seconds = timed(lambda i=instance: work(i, 5.0 if quick else 20.0))
        else:
            (utility, done), seconds = timed(lambda i=instance, s=b: work(i, s))
        lost.append(max(float(distance(best[b], torch.tensor(utility))), 0.0))
        times.append(seconds)
        proposals += done
    _, _, memory = peak_gib(lambda: work(instances[0], 5.0) if work is peers.integer_program else work(instances[0], 0))
    each = statistics.median(times)
    return _filled(problem, work.__name__, [each] * 3, np.array(lost), proposals / sum(times), memory)


def _filled(
    problem: str, name: str, seconds: Sequence[float | None], lost: np.ndarray, speed: float, memory: float
) -> dict[str, Any]:
    hit = float((lost <= CLOSE).mean())
    first = seconds[0]
    assert first is not None
    runs = math.inf if hit == 0 else 1.0 if hit >= CONFIDENCE else math.log(1 - CONFIDENCE) / math.log(1 - hit)
    return {
        "problem": problem,
        "method": name,
        "seconds": seconds,
        "gap_median": float(np.median(lost)),
        "gap_worst": float(lost.max()),
        "within_0.1_percent": hit,
        "seconds_to_0.1_percent": first * max(runs, 1.0) if math.isfinite(runs) else None,
        "proposals_per_s": speed,
        "peak_gib": memory,
    }


def _curves(quick: bool) -> dict[str, list[tuple[float, float]]]:
    """Gap against seconds a scenario as each method is given more, joint problem, batch 16."""
    size: dict[str, Any] = {"categories": 6, "models": 4, "steps": 20} if quick else {"categories": 16, "models": 8}
    scenario = es.Scenario.random(2 if quick else 16, **size, seed=5)
    best = es.search.branch(scenario, nodes=2000, tolerance=0.0).utility
    efforts = (1, 2) if quick else (1, 2, 4, 8, 16)
    kinds = {
        "anneal": lambda n: anneal(scenario, None, 16, 60 * n),
        "relax": lambda n: es.search.relax(scenario, starts=n, iterations=60),
        "tree": lambda n: es.search.tree(scenario, iterations=15 * n),
        "random_search": lambda n: es.search.random_search(scenario, samples=500 * n),
        "coordinate": lambda n: es.search.coordinate(scenario, starts=n),
        "branch": lambda n: es.search.branch(scenario, nodes=8 * n),
    }
    curves = {}
    for name, work in kinds.items():
        points = []
        for effort in efforts:
            result, seconds = timed(lambda work=work, effort=effort: work(effort))
            points.append((seconds / len(scenario), float(distance(best, result.utility).clamp(min=1e-9).mean())))
        curves[name] = points
    return curves


def scaling(quick: bool, tell: Tell) -> dict[str, Any]:
    """Seconds a scenario as one size grows, the others at C = 16, M = 8, K = 50, batch 16, and the exponent of growth."""
    grids: dict[str, tuple[int, ...]]
    grids = {"models": (3, 8, 32), "categories": (4, 16, 64), "steps": (10, 50, 200), "batch": (1, 64, 1024),
             "chains": (32, 128, 512)}  # fmt: skip
    base = {"batch": 16, "categories": 16, "models": 8, "steps": 50}
    if quick:
        grids = {"models": (2, 4), "batch": (1, 4)}
        base = {"batch": 2, "categories": 4, "models": 3, "steps": 10}
    found: dict[str, dict[str, Any]] = {}
    for axis, values in grids.items():
        for name in ("anneal",) if axis == "chains" else ("coordinate", "solve", "anneal"):
            points = []
            for value in values:
                size: dict[str, Any] = {**base, axis: value}
                chains = size.pop("chains", 32)
                scenario = es.Scenario.random(size.pop("batch"), **size, seed=2)

                def work(name: str = name, scenario: es.Scenario = scenario, chains: int = chains) -> es.SearchResult:
                    return anneal(scenario, None, chains, 200) if name == "anneal" else ours(name, scenario, None)

                work()
                runs = [timed(work)[1] for _ in range(1 if axis == "batch" else 2)]
                points.append((value, min(runs) / len(scenario)))
            logs = np.log(np.array(points))
            exponent = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
            found.setdefault(axis, {})[name] = {"points": points, "exponent": exponent}
            tell(f"{axis}: {name} grows as size^{exponent:.2f}")
    return found


def many(quick: bool, tell: Tell, device: torch.device) -> dict[str, Any]:
    """Speed and quality at sizes that fill a device."""
    gpu = device.type == "cuda"
    speed = {}
    for batch in (8,) if quick else (64, 1024, 8192) if gpu else (64, 256):
        scenario = es.Scenario.random(batch, seed=1).to(device)
        routed, iterations = drawn_assignment(scenario), 48 if quick else 2000
        anneal(scenario, routed, 1024, 48, compiled=True)
        runs = [anneal(scenario, routed, 1024, iterations, seed=i, compiled=True) for i in range(1 if quick else 3)]
        speed[batch * 1024] = max(r.proposals / r.elapsed_s for r in runs)
        tell(f"{batch * 1024} chains: {speed[batch * 1024]:.3g} proposals/s")
    found = {}
    for problem, size in (("given", 100_000), ("joint", 100_000 if gpu else 4096)):
        scenario = es.Scenario.random(64 if quick else size)
        given = drawn_assignment(scenario) if problem == "given" else None
        proof, proving = timed(lambda s=scenario, g=given: es.search.branch(s, assignment=g, nodes=64))  # on the CPU
        scenario = scenario.to(device)
        rows = []
        for chains, iterations in ((8, 100), (16, 200), (32, 400), (64, 1600), (128, 3200)):
            anneal(scenario[:64], None if given is None else given[:64], chains, iterations)
            result = anneal(scenario, given, chains, iterations)
            lost = distance(proof.utility, result.utility.cpu())
            rows.append({"chains": chains, "iterations": iterations, "seconds": result.elapsed_s,
                         "gap_worst": float(lost.max()), "gap_median": float(lost.median()),
                         "within_0.1_percent": float((lost <= CLOSE).double().mean())})  # fmt: skip
            tell(f"{problem}, {len(scenario)} scenarios, {chains} chains × {iterations}: {result.elapsed_s:.2f} s, "
                 f"worst gap {float(lost.max()):.1e}")  # fmt: skip
            if quick or rows[-1]["gap_worst"] <= CLOSE:
                break
        found[problem] = {
            "scenarios": len(scenario),
            "annealing": rows,
            "branch": {"seconds": proving, "proven_gap_worst": float(proof.gap.max())},
        }
    return {"device": torch.cuda.get_device_name(device) if gpu else "CPU", "proposals_per_s": speed, **found}


def show(console: Console, results: Mapping[str, Any]) -> None:
    """Print what was measured."""
    for name in ("ratios", "joint", "single", "many"):
        if name in results:
            console.print(f"[bold]{name}[/bold]")
            console.print_json(json.dumps(results[name]))
    if "peers" in results:
        batches = results["peers"]["batches"]
        columns = [
            "problem",
            "method",
            *(f"ms at {b}" for b in batches),
            "gap median",
            "worst",
            "s to 0.1 %",
            "proposals/s",
            "GiB",
        ]
        table = Table(*columns, title="Peers")
        for row in results["peers"]["rows"]:
            reach = row["seconds_to_0.1_percent"]
            cells = [f"{1e3 * s:.3g}" if s is not None else "–" for s in row["seconds"]]
            table.add_row(row["problem"], row["method"], *cells, f"{row['gap_median']:.1e}", f"{row['gap_worst']:.1e}",
                          "never" if reach is None else f"{reach:.3g}", f"{row['proposals_per_s']:.2g}",
                          f"{row['peak_gib']:.2f}")  # fmt: skip
        console.print(table)
    if "scaling" in results:
        table = Table("grows", "method", "ms a scenario", "exponent", title="Scaling")
        for axis, methods in results["scaling"].items():
            for method, found in methods.items():
                points = ", ".join(f"{v}: {1e3 * s:.3g}" for v, s in found["points"])
                table.add_row(axis, method, points, f"{found['exponent']:.2f}")
        console.print(table)


def main() -> None:
    """Run the sections asked for, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--json", type=Path, help="file for what was measured")
    parser.add_argument("--figures", type=Path, help="folder for figures (PNG and SVG)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--device", help="device of the section many, as torch names it; a GPU if there is one")
    options = parser.parse_args()
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        parser.error(f"--device: {options.device!r} cannot be used here ({str(exc).splitlines()[0]})")
    wanted = options.only.split(",")
    for name in wanted:
        if name not in SECTIONS:
            parser.error(f"--only: {name!r} is not one of {', '.join(SECTIONS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = {"name": platform.processor() or platform.machine(), "cores": os.cpu_count(),
              "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        machine["name"] = names[0] if names else machine["name"]
    results = {"device": machine, "quick": options.quick}
    console = Console() if Console().is_terminal else Console(width=160)
    work = {"ratios": ratios, "joint": joint, "single": single, "peers": compare, "scaling": scaling,
            "many": lambda quick, tell: many(quick, tell, device)}  # fmt: skip
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("sections", total=len(wanted))
        for name in wanted:
            progress.update(task, description=name)
            results[name], seconds = timed(lambda name=name: work[name](options.quick, progress.console.print))
            results.setdefault("section_seconds", {})[name] = seconds
            progress.advance(task)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2))
    show(console, results)
    if options.figures:
        for path in draw(results, options.figures):
            console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
