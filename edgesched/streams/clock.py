"""What time it is, given to whoever serves in real time, so that a test can give a time of its own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A time that passes."""

    def now(self) -> float:
        """Seconds since some moment; never goes back."""

    def sleep(self, seconds: float) -> None:
        """Come back when so many seconds have passed."""


class WallClock:
    """The machine's own time."""

    def now(self) -> float:
        """Seconds since the machine's start or thereabouts."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Let other threads and processes work."""
        time.sleep(seconds)


WALL = WallClock()
