"""The pool of shared values: one load, counted users and one close, under races too."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from pytest_sway.backends.local.pool import PoolLease, SharedPool
from tests.unit.fakes import DEADLINE, Call, Gate


class Values:
    """Counts the loads and closes of a pool."""

    def __init__(self) -> None:
        self.pool: SharedPool[str, str] = SharedPool(self.close)
        self.loads: Counter[str] = Counter()
        self.closed: list[str] = []
        self.load_errors: list[BaseException] = []
        self.close_errors: list[BaseException] = []
        self.load_gate: Gate | None = None
        self.close_gate: Gate | None = None

    def load(self, key: str) -> str:
        self.loads[key] += 1
        value = f"{key}{self.loads[key]}"
        if self.load_gate:
            self.load_gate.pass_through()
        if self.load_errors:
            raise self.load_errors.pop(0)
        return value

    def close(self, value: str) -> None:
        if self.close_gate:
            self.close_gate.pass_through()
        self.closed.append(value)
        if self.close_errors:
            raise self.close_errors.pop(0)

    def acquire(self, key: str) -> PoolLease[str]:
        return self.pool.acquire(key, partial(self.load, key))


@pytest.fixture
def values() -> Values:
    return Values()


class Announced(dict[str, object]):
    """The slots of a pool, which signal each look-up."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)

    def setdefault(self, key: str, default: object = None) -> object:
        try:
            return super().setdefault(key, default)
        finally:
            self.asked.release()

    def until_asked(self, times: int) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=DEADLINE), "nobody asked"


def _announced(values: Values) -> Announced:
    announced = Announced()
    values.pool._slots = announced  # type: ignore[assignment]
    return announced


def test_a_value_is_loaded_once_and_closed_after_its_last_user(values: Values) -> None:
    first, second = values.acquire("a"), values.acquire("a")
    assert (first.value, second.value) == ("a1", "a1")
    assert (first.fresh, second.fresh) == (True, False)
    first.release()
    assert values.closed == []
    second.release()
    assert values.closed == ["a1"]
    assert values.pool.keys() == []


def test_after_its_close_it_is_loaded_anew(values: Values) -> None:
    values.acquire("a").release()
    share = values.acquire("a")
    assert (share.value, share.fresh) == ("a2", True)


def test_keys_are_apart(values: Values) -> None:
    a, b = values.acquire("a"), values.acquire("b")
    assert values.pool.keys() == ["a", "b"]
    a.release()
    assert values.closed == ["a1"]
    assert b.value == "b1"


def test_requests_during_a_load_wait_for_it(values: Values) -> None:
    announced = _announced(values)
    values.load_gate = Gate()
    calls = [Call(partial(values.acquire, "a")) for _ in range(5)]
    values.load_gate.wait()
    announced.until_asked(5)
    values.load_gate.open()
    shares = [call.result() for call in calls]
    assert {share.value for share in shares} == {"a1"}
    assert sum(share.fresh for share in shares) == 1
    for share in shares:
        assert values.closed == []
        share.release()
    assert values.closed == ["a1"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_load_that_raises_is_not_remembered(values: Values, error: BaseException) -> None:
    values.load_errors = [error]
    with pytest.raises(type(error)):
        values.acquire("a")
    assert values.pool.keys() == []
    assert values.closed == []
    assert values.acquire("a").value == "a2"


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_who_waits_for_a_load_that_raises_loads_itself(values: Values, error: BaseException) -> None:
    announced = _announced(values)
    values.load_gate = Gate()
    values.load_errors = [error]
    leader = Call(partial(values.acquire, "a"))
    values.load_gate.wait()
    waiter = Call(partial(values.acquire, "a"))
    announced.until_asked(2)
    values.load_gate.open()
    assert leader.error() is error
    share = waiter.result()
    assert (share.value, share.fresh) == ("a2", True)
    share.release()
    assert values.closed == ["a2"]
    assert values.pool.keys() == []


def test_a_release_again_is_harmless(values: Values) -> None:
    first, second = values.acquire("a"), values.acquire("a")
    first.release()
    first.release()
    assert values.closed == []
    second.release()
    second.release()
    assert values.closed == ["a1"]


def test_a_late_release_does_not_touch_the_next_value(values: Values) -> None:
    old = values.acquire("a")
    old.release()
    new = values.acquire("a")
    old.release()
    assert values.closed == ["a1"]
    new.release()
    assert values.closed == ["a1", "a2"]


def test_a_release_from_many_threads_at_once_counts_once(values: Values) -> None:
    first, second = values.acquire("a"), values.acquire("a")
    start = threading.Barrier(8)

    def release() -> None:
        start.wait(DEADLINE)
        first.release()

    for call in [Call(release) for _ in range(8)]:
        call.result()
    assert values.closed == []
    second.release()
    assert values.closed == ["a1"]


def test_what_is_held_is_not_closed(values: Values) -> None:
    share = values.acquire("a")
    with values.pool.pin("a"):
        share.release()
        again = values.acquire("a")
        assert not again.fresh
        again.release()
        assert values.closed == []
    assert values.closed == ["a1"]


def test_to_hold_loads_nothing(values: Values) -> None:
    with values.pool.pin("a"):
        assert values.pool.keys() == []
        values.acquire("a").release()
    assert values.closed == ["a1"]
    assert values.pool.keys() == []


def test_a_hold_ends_when_its_block_raises(values: Values) -> None:
    with pytest.raises(ZeroDivisionError), values.pool.pin("a"):
        raise ZeroDivisionError
    share = values.acquire("a")
    with pytest.raises(ZeroDivisionError), values.pool.pin("a"):
        raise ZeroDivisionError
    share.release()
    assert values.closed == ["a1"]


def test_what_is_closing_can_no_longer_be_held(values: Values) -> None:
    share = values.acquire("a")
    values.close_gate = Gate()
    releaser = Call(share.release)
    values.close_gate.wait()
    with values.pool.pin("a"):
        values.close_gate.open()
        releaser.result()
        assert values.closed == ["a1"]


def test_who_asks_during_a_close_waits_for_it_and_loads_anew(values: Values) -> None:
    announced = _announced(values)
    share = values.acquire("a")
    values.close_gate = Gate()
    releaser = Call(share.release)
    values.close_gate.wait()
    askers = [Call(partial(values.acquire, "a")) for _ in range(3)]
    announced.until_asked(4)
    assert values.loads == {"a": 1}
    values.close_gate.open()
    releaser.result()
    assert {asker.result().value for asker in askers} == {"a2"}
    assert (values.loads, values.closed) == ({"a": 2}, ["a1"])


def test_who_asks_between_the_last_release_and_the_close_keeps_the_value(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = values.acquire("a")
    slot = values.pool._slots["a"]
    announced = _announced(values)
    announced["a"] = slot
    departed = threading.Event()
    usual: Callable[..., bool] = values.pool._depart

    def depart(*args: object) -> bool:
        was_last = usual(*args)
        departed.set()
        return was_last

    monkeypatch.setattr(values.pool, "_depart", depart)
    with slot.guard:
        releaser = Call(share.release)
        assert departed.wait(DEADLINE)
        asker = Call(partial(values.acquire, "a"))
        announced.until_asked(1)
    releaser.result()
    assert asker.result().value == "a1"
    assert values.closed == []


def test_what_is_withdrawn_is_loaded_anew_and_closed_after_its_last_user(values: Values) -> None:
    old = values.acquire("a")
    values.pool.withdraw(old.value)
    assert values.pool.keys() == []
    new = values.acquire("a")
    assert (new.value, new.fresh) == ("a2", True)
    old.release()
    assert values.closed == ["a1"]
    assert values.acquire("a").value == "a2"


def test_to_withdraw_what_is_not_there_is_harmless(values: Values) -> None:
    share = values.acquire("a")
    values.pool.withdraw("b1")
    values.pool.withdraw("a1")
    values.pool.withdraw("a1")
    share.release()
    assert values.closed == ["a1"]


@pytest.mark.parametrize("again", ["release", "request"])
def test_a_close_that_was_interrupted_is_called_again(values: Values, again: str) -> None:
    share = values.acquire("a")
    values.close_errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        share.release()
    if again == "release":
        share.release()
        assert values.pool.keys() == []
    else:
        assert values.acquire("a").value == "a2"
    assert values.closed == ["a1", "a1"]


def test_a_close_that_raises_goes_up_once_and_frees_the_key(values: Values) -> None:
    share = values.acquire("a")
    values.close_errors = [RuntimeError("stuck")]
    with pytest.raises(RuntimeError):
        share.release()
    share.release()
    assert values.closed == ["a1"]
    assert values.pool.keys() == []
    assert values.acquire("a").value == "a2"


@pytest.mark.parametrize("step", ["_join", "_leave", "_depart", "_give_up", "_remove", "_finish"])
def test_after_an_interrupt_in_a_step_the_next_user_finds_all_in_order(
    values: Values, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The interrupt comes after the step is done, and before it returns."""
    usual: Callable[..., object] = getattr(values.pool, step)

    def interrupted(*args: object) -> object:
        usual(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(values.pool, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            values.acquire("a").release()
    Call(lambda: values.acquire("a").release()).result()
    assert values.pool.keys() == []
    assert len(values.closed) == sum(values.loads.values())
