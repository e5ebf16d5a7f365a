"""One thread for small work: waking a second costs more than it brings, and far more on a busy machine.

``torch.set_num_threads`` changes the whole process, a server's other threads included. OpenMP and MKL keep a number of
threads for every calling thread by themselves, and PyTorch asks them there: those numbers alone are set here.
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


def _library(patterns: tuple[str, ...], needed: tuple[str, ...]) -> ctypes.CDLL | None:
    """The first of PyTorch's own libraries that has these functions."""
    folder = Path(torch.__file__).parent / "lib"
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            try:
                library = ctypes.CDLL(str(path))
                for name in needed:
                    getattr(library, name)
            except (OSError, AttributeError):
                continue
            return library
    return None


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch runs on, or None where it is not to be found."""
    names = ("libgomp*.so*", "libomp*.so*", "libiomp*.so*", "libomp*.dylib", "libiomp*.dylib", "libiomp*.dll")
    return _library(names, ("omp_set_num_threads", "omp_get_max_threads"))


@functools.cache
def _mkl() -> ctypes.CDLL | None:
    """The MKL inside PyTorch; None where it has another BLAS."""
    return _library(("libtorch_cpu*.so*", "libtorch_cpu*.dylib", "torch_cpu*.dll"), ("MKL_Set_Num_Threads_Local",))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's tensor operations on one thread; other threads of the process keep theirs.

    Where PyTorch's OpenMP library is not found nothing changes: slower on a busy machine, with the same results.
    """
    library, mkl = _openmp(), _mkl()
    before = torch.get_num_threads()
    if library is None or before == 1:
        yield
        return
    library.omp_set_num_threads(1)
    # Once anyone has called torch.set_num_threads, MKL no longer asks OpenMP.
    kept = None if mkl is None else mkl.MKL_Set_Num_Threads_Local(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
        if mkl is not None:
            mkl.MKL_Set_Num_Threads_Local(kept)


def threads_for(cells: int) -> AbstractContextManager[None]:
    """:func:`one_thread` if ``cells`` are few, else nothing."""
    return nullcontext() if cells > SMALL else one_thread()
