"""One thread for small work: waking a second costs more than it brings, and far more on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Below this many numbers in the batch's quality one thread is used. On two cores shared with other work, a plan
#: for C = 16, M = 8, K = 50 took 8 ms with one thread and 730 ms with two that waited for each other at every step;
#: 256 of them (1.6 million numbers) 0.2 s and 0.5 s.
SMALL = 2_000_000


@contextmanager
def threads_for(cells: int) -> Iterator[None]:
    """Run the block with one thread if ``cells`` are few; the number of threads is restored."""
    before = torch.get_num_threads()
    if cells > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
