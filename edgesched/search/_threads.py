"""One thread for small work: waking a second costs more than it brings, and far more on a busy machine.

``torch.set_num_threads`` changes the whole process, a server's other threads included. OpenMP keeps its number of
threads for every calling thread by itself, and PyTorch asks it there: that number alone is set here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

#: Below this many numbers in the batch's quality one thread is used. On two cores shared with other work, a plan
#: for C = 16, M = 8, K = 50 took 8 ms with one thread and 730 ms with two that waited for each other at every step;
#: 256 of them (1.6 million numbers) 0.2 s and 0.5 s.
SMALL = 2_000_000


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch runs on, or None where it is not to be found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libgomp*.so*", "libomp*.so*", "libiomp*.so*", "libomp*.dylib", "libiomp*.dylib", "libiomp*.dll"):
        for path in sorted(folder.glob(name)):
            try:
                library = ctypes.CDLL(str(path))
                library.omp_set_num_threads, library.omp_get_max_threads  # noqa: B018
            except (OSError, AttributeError):
                continue
            return library
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's tensor operations on one thread; other threads of the process keep theirs.

    Where PyTorch's OpenMP library is not found nothing changes: slower on a busy machine, with the same results.
    """
    library = _openmp()
    before = torch.get_num_threads()
    if library is None or before == 1:
        yield
        return
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)


def threads_for(cells: int) -> AbstractContextManager[None]:
    """:func:`one_thread` if ``cells`` are few, else nothing."""
    return nullcontext() if cells > SMALL else one_thread()
