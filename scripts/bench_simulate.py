"""Requests a second of the simulator: `python scripts/bench_simulate.py [--requests 1000000] [--json FILE]`.

Eight plans serve one Poisson stream of four categories by three models; the first requests of one plan are served by
SimPy too, event by event, and every latency compared.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import edgesched as es
from edgesched.equations.utility import service_times
from edgesched.streams.arrivals import poisson
from edgesched.streams.queues import simpy_latency, simulate

PLANS = 8


def main() -> None:
    """Simulate, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--compared", type=int, default=20_000, help="requests that SimPy serves too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scenario = es.Scenario.random(1, latency="queue", seed=0)
    rows = torch.rand(PLANS, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plans = es.search.anneal(scenario.repeat(PLANS), assignment=rows / rows.sum(-1, keepdim=True), chains=32).plan
    stream = poisson(scenario.demand[0].tolist(), ["a", "b", "c", "d"], requests=options.requests, seed=0)
    begun = time.perf_counter()
    served = simulate(stream, scenario, plans, seed=0)
    seconds = time.perf_counter() - begun
    few = min(options.compared, options.requests)
    service = (service_times(scenario.repeat(PLANS), plans.steps) / plans.share)[0].double()
    begun = time.perf_counter()
    again = simpy_latency(stream.arrival_s[0, :few], service, served.model[0, 0, :few])
    simpy_seconds = time.perf_counter() - begun
    found = {
        "requests": options.requests, "plans": PLANS, "seconds": seconds,
        "requests_per_s": PLANS * options.requests / seconds, "simpy_requests_per_s": few / simpy_seconds,
        "ratio": PLANS * options.requests / seconds / (few / simpy_seconds),
        "simpy_max_abs_s": float((again - served.latency_s[0, 0, :few]).abs().max()), "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
