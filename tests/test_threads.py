"""One thread where it is asked for, and nowhere else: OpenMP's and MKL's own numbers, and the threads that work."""

import re
import subprocess
import sys
import threading

import pytest
import torch

from edgesched.search._threads import SMALL, one_thread, threads_for


def numbers():
    """What PyTorch reports of itself, OpenMP and MKL, in the calling thread."""
    report = torch.__config__.parallel_info()
    return {name: int(value) for name, value in re.findall(r"(\w+(?:max|num)_threads)\(\) : (\d+)", report)}


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def elsewhere(function):
    """A function's value in a thread of its own."""
    found = []
    beside = threading.Thread(target=lambda: found.append(function()))
    beside.start()
    beside.join()
    return found[0]


@pytest.mark.usefixtures("three_threads")
def test_one_thread_is_of_the_calling_thread_alone_and_ends_with_the_block():
    assert set(numbers().values()) == {3}
    with one_thread():
        assert set(numbers().values()) == {1}
        assert set(elsewhere(numbers).values()) == {3}
        with one_thread():
            assert set(numbers().values()) == {1}
        assert set(numbers().values()) == {1}
    assert set(numbers().values()) == {3}
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert set(numbers().values()) == {3}


@pytest.mark.usefixtures("three_threads")
def test_a_thread_that_asks_for_one_leaves_the_others_theirs():
    def inside():
        with one_thread():
            return numbers()

    assert set(elsewhere(inside).values()) == {1}
    assert set(numbers().values()) == {3}
    assert set(elsewhere(numbers).values()) == {3}


@pytest.mark.usefixtures("three_threads")
def test_only_small_work_is_done_on_one():
    with threads_for(SMALL):
        assert set(numbers().values()) == {1}
    with threads_for(SMALL + 1):
        assert set(numbers().values()) == {3}


#: Counts the kernel's threads of a fresh process: OpenMP starts its helpers with the first work that is shared out.
COUNTING = """
import os, threading
import torch
from edgesched.search._threads import one_thread

torch.set_num_threads(3)
gate, counts = threading.Barrier(2), {}

def work():
    torch.ones(4_000_000).exp_()

def count():
    return len(os.listdir("/proc/self/task"))

def alone():
    gate.wait()
    with one_thread():
        before = count()
        work()
        counts["alone"] = count() - before
    gate.wait()
    gate.wait()

def beside():
    gate.wait()
    gate.wait()
    before = count()
    work()
    counts["beside"] = count() - before
    gate.wait()

threads = [threading.Thread(target=one) for one in (alone, beside)]
for one in threads:
    one.start()
for one in threads:
    one.join()
print(counts["alone"], counts["beside"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_work_inside_wakes_no_second_thread_and_work_beside_it_does():
    done = subprocess.run([sys.executable, "-c", COUNTING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "2"]
