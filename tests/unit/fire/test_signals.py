"""Real signals at random moments, between any two bytecodes of the cache.

Excluded are signals inside a backend's ``close()``, which counts as called once its first line runs. As in
`test_interrupts`, signals while an error is handled are excluded too.
"""

from __future__ import annotations

import gc
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from pytest_sway.system import locking
from tests.unit.fire.profiles import PROFILE
from tests.unit.fire.test_interrupts import CACHE_FILES, SCENARIOS, Scenario

FILES = CACHE_FILES | {locking.__file__}

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers that signal")


class Striker:
    """Raises KeyboardInterrupt in this thread after a delay, as soon as the cache's own code runs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.armed = False
        self.struck = False

    def arm(self, delay: float) -> None:
        self.armed, self.struck = True, False
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))

    def disarm(self) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def handle(self, _number: int, frame: FrameType | None) -> None:
        if self.armed and frame is not None:
            if _may_strike(frame):
                self.armed, self.struck = False, True
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(3e-5, 2e-4))


def _may_strike(frame: FrameType) -> bool:
    at: FrameType | None = frame
    while at is not None:
        if at.f_code.co_name in ("close", "__del__"):
            return False
        at = at.f_back
    return frame.f_code.co_filename in FILES and sys.exc_info()[0] is None


@pytest.fixture
def striker() -> Iterator[Striker]:
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()
    made = Striker(seed=1)
    usual = signal.signal(signal.SIGALRM, made.handle)
    yield made
    made.disarm()
    signal.signal(signal.SIGALRM, usual)
    gc.unfreeze()
    logging.disable(logging.NOTSET)


def _act_under_fire(striker: Striker, scenario: Scenario, usual_seconds: float) -> None:
    try:
        striker.arm(striker.random.uniform(0, usual_seconds))
        try:
            scenario.act()
        finally:
            striker.disarm()
    except KeyboardInterrupt:
        assert striker.struck
    except scenario.expected:
        assert not striker.struck


def test_a_signal_at_any_moment_loses_nothing(striker: Striker) -> None:
    usual_seconds: dict[type[Scenario], float] = {}
    strikes = 0
    for number in range(PROFILE.signals):
        make = SCENARIOS[number % len(SCENARIOS)]
        scenario = make()
        started = time.perf_counter()
        _act_under_fire(striker, scenario, usual_seconds.get(make, 1e-3))
        strikes += striker.struck
        if not striker.struck:
            usual_seconds[make] = time.perf_counter() - started
        try:
            scenario.verify()
        except BaseException as error:
            error.add_note(f"in {make.__name__}, run {number}, struck: {striker.struck}")
            raise
    print(f"{PROFILE.signals} runs, {strikes} strikes")
    assert strikes > PROFILE.signals / 20
