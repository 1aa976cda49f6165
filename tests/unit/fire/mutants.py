"""Bugs that systems like this one really had, sown into our modules one at a time: the table of bug and killer.

Loaded as a plugin (``pytest -p tests.unit.fire.mutants``) it changes a module while it is imported, in memory, as the
environment variable SWAY_MUTANT says.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType


@dataclass(frozen=True)
class Mutant:
    """A bug, the changes that make it, and the test that finds it.

    Attributes:
        bug: What it is, in words.
        module: The module that has it.
        changes: What is replaced by what; each stands in the source exactly once.
        killer: The test that fails.
    """

    bug: str
    module: str
    changes: tuple[tuple[str, str], ...]
    killer: str

    def applied_to(self, source: str) -> str:
        for old, new in self.changes:
            assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {self.module}"
            source = source.replace(old, new)
        return source


def _in_cache(bug: str, killer: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(bug, "pytest_sway.cache.backend_cache", changes, f"tests/unit/cache/{killer}")


def _in_ledger(bug: str, killer: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(bug, "pytest_sway.cache.ledger", changes, f"tests/unit/cache/{killer}")


def _in_entries(bug: str, killer: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(bug, "pytest_sway.cache.entries", changes, f"tests/unit/cache/{killer}")


def _in_budget(bug: str, killer: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(bug, "pytest_sway.cache.budget", changes, f"tests/unit/cache/{killer}")


def _in_pool(bug: str, killer: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(bug, "pytest_sway.backends.local.pool", changes, f"tests/unit/{killer}")


def _in_spec(bug: str, killer: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(bug, "pytest_sway.spec.identity", changes, f"tests/unit/spec/test_spec.py::{killer}")


MUTANTS = (
    _in_entries(
        "the victim is chosen among leased entries too",
        "test_closing.py::test_inv02_what_is_leased_is_not_closed_to_make_room",
        ("return self.state is State.READY and not self.claims", "return self.state is State.READY"),
    ),
    _in_entries(
        "an entry is evicted while it loads",
        "test_room.py::test_inv07_what_is_loading_is_never_a_victim",
        (
            "return self.state is State.READY and not self.claims",
            "return self.state in (State.LOADING, State.READY) and not self.claims",
        ),
    ),
    _in_entries(
        "room is credited before the close returns",
        "test_room.py::test_inv04_what_another_thread_is_closing_counts",
        ("{State.LOADING, State.READY, State.CLOSING}", "{State.LOADING, State.READY}"),
    ),
    _in_cache(
        "room is made after the load",
        "test_room.py::test_inv04_room_is_freed_before_the_load_begins",
        ("                self._make_room(operation, plan.sizes)\n", ""),
        (
            "operation.built.extend(map(self._build.build, [plan]))",
            "operation.built.extend(map(self._build.build, [plan])); self._make_room(operation, plan.sizes)",
        ),
    ),
    _in_ledger(
        "the oldest goes, not the least recently used",
        "test_room.py::test_inv07_the_victim_is_the_least_recently_used",
        ("            self._entries.move_to_end(key)\n", ""),
    ),
    _in_ledger(
        "two load when a second asks during the load",
        "test_loading.py::test_inv01_all_who_wait_for_a_load_get_its_object",
        (
            "if entry is None:\n            operation",
            "if entry is None or entry.state is State.LOADING:\n            operation",
        ),
    ),
    _in_ledger(
        "who waited holds no lease when the entry becomes ready",
        "test_loading.py::test_inv05_leases_of_those_who_waited_exist_when_the_entry_becomes_ready",
        ("waiter.lease = self._grant(entry, waiter)", "pass"),
    ),
    _in_ledger(
        "who waits is not woken by the load",
        "test_loading.py::test_inv01_all_who_wait_for_a_load_get_its_object",
        (
            "self._budget.surplus(self._residents(), entry))\n        self._announce()",
            "self._budget.surplus(self._residents(), entry))",
        ),
    ),
    _in_ledger(
        "who waits is not told of the failure",
        "test_loading.py::test_inv09_leader_and_waiters_get_the_error_of_one_load_and_the_next_call_tries_again",
        ("            waiter.error = error\n", ""),
    ),
    _in_ledger(
        "who waits is not woken by a failure or an interrupt",
        "test_loading.py::test_inv10_an_interrupt_goes_up_where_it_struck_and_a_waiter_takes_over",
        (
            "operation.lease = operation.error = operation.waits_for = None\n        self._announce()",
            "operation.lease = operation.error = operation.waits_for = None",
        ),
    ),
    _in_ledger(
        "a failed load stays in the cache",
        "test_loading.py::test_inv09_a_failed_load_leaves_its_room_to_others",
        ("if entry.state in (State.QUEUED, State.LOADING):", "if entry.state is State.QUEUED:"),
    ),
    _in_cache(
        "an interrupted load keeps its reservation",
        "test_loading.py::test_inv10_an_interrupt_goes_up_where_it_struck_and_a_waiter_takes_over",
        ("return lease\n        except BaseException as error:", "return lease\n        except Exception as error:"),
    ),
    _in_ledger(
        "what is closing is handed out",
        "test_closing.py::test_inv06_who_asks_for_what_is_closing_waits_and_gets_a_new_one",
        (
            "if entry.state is State.READY:\n            self._entries",
            "if entry.state in (State.READY, State.CLOSING):\n            self._entries",
        ),
    ),
    _in_ledger(
        "a stale release hits the next generation",
        "test_lifetimes.py::test_inv08_a_late_release_does_not_touch_the_next_generation",
        (
            "entry.claims.discard(claim)\n        self._announce()",
            "self._entries.get(entry.key, entry).claims.clear()\n        self._announce()",
        ),
    ),
    _in_ledger(
        "a second release takes another's lease",
        "test_lifetimes.py::test_inv15_releasing_twice_is_harmless",
        (
            "entry.claims.discard(claim)\n        self._announce()",
            "entry.claims and entry.claims.pop()\n        self._announce()",
        ),
    ),
    _in_ledger(
        "evicting all closes what is leased",
        "test_closing.py::test_inv02_what_is_leased_is_closed_after_its_last_lease",
        ("if entry.idle and chosen(entry)]", "if chosen(entry)]"),
    ),
    _in_cache(
        "a close that raises fails the request that made room",
        "test_closing.py::test_inv11_a_close_that_raises_fails_nobody_elses_request",
        (
            'self._note_close_error(f"closing {entry.spec} failed", raised)\n',
            'self._note_close_error(f"closing {entry.spec} failed", raised)\n            raise\n',
        ),
    ),
    _in_ledger(
        "a load that ends after the shutdown is kept",
        "test_closing.py::test_inv03_a_load_that_ends_after_the_shutdown_gave_up_on_it_is_closed",
        (
            '        entry = cast("Entry", operation.entry)\n        if self._shut:',
            '        entry = cast("Entry", operation.entry)\n        if not self:',
        ),
    ),
    _in_ledger(
        "a load that asks for itself waits forever",
        "test_loading.py::test_inv14_a_load_that_asks_for_itself_is_told_so",
        ("if any(leader.thread is operation.thread for leader in self._leaders(entry)):", "if not self:"),
    ),
    _in_ledger(
        "who holds all the room waits for itself",
        "test_room.py::test_inv17_it_is_refused_at_once_when_who_asks_holds_it_all",
        ("if self._never_fits(newcomer, operation):", "if not self:"),
    ),
    _in_entries(
        "a lease that its thread has left is waited for by who would have to release it",
        "test_room.py::test_inv17_the_lease_that_a_thread_has_left_is_not_waited_for_in_the_main_thread",
        ("threading.main_thread() if self.orphaned else self.thread", "self.thread"),
    ),
    _in_entries(
        "a test waits for what another of its threads keeps to its end",
        "test_room.py::test_inv17_what_a_test_keeps_to_its_end_is_its_own_in_all_its_threads",
        ("if self.owner.keeps and self.holder == asker.holder:", "if not asker:"),
    ),
    _in_cache(
        "a load that was under way when its test ended is pinned",
        "test_lifetimes.py::TestOwner::test_inv17_a_load_under_way_at_its_end_is_pinned_by_nobody",
        ("if owner.over:  # it may", "if not self:  # it may"),
    ),
    _in_ledger(
        "the end of a test ends the leases of another",
        "test_lifetimes.py::TestOwner::test_inv17_its_leases_end_with_it_however_they_are_kept",
        ("[claim for claim in entry.claims if claim.owner is owner]", "list(entry.claims)"),
    ),
    _in_cache(
        "the base is closed while room is made for its next adapter",
        "test_room.py::test_inv16_a_swap_of_adapters_at_max_size_1_never_reloads_the_base",
        ("with self._build.hold(plan):", "with self._listener.loading(spec):"),
    ),
    _in_pool(
        "a base is closed with an adapter alive",
        "cache/test_room.py::test_inv16_a_base_goes_with_its_last_adapter",
        ("slot.users.discard(user)", "slot.users.clear()"),
    ),
    _in_pool(
        "two load a base at once",
        "backends/local/test_pool.py::test_those_who_ask_during_a_load_wait_for_it",
        ("holding(slot.guard, partial(self._share, slot, user, load))", "self._share(slot, user, load)"),
    ),
    _in_pool(
        "a base that closes is handed out",
        "backends/local/test_pool.py::test_who_asks_during_a_close_waits_for_it_and_loads_anew",
        ("holding(slot.guard, partial(self._close_unused, slot))", "self._close_unused(slot)"),
    ),
    _in_pool(
        "a base is closed though somebody just asked for it",
        "backends/local/test_pool.py::test_who_asks_between_the_last_release_and_the_close_keeps_the_value",
        ("slot.gone = slot.gone or not slot.users", "slot.gone = True"),
    ),
    _in_budget(
        "a shared base is counted for each adapter",
        "test_room.py::test_inv16_a_shared_base_counts_once",
        ("parts[part] = max(size, parts.get(part, 0))", "parts[part] = size + parts.get(part, 0)"),
    ),
    _in_budget(
        "an unknown size counts as none",
        "test_room.py::test_inv18_an_unknown_size_counts_as_the_whole_budget",
        ("if entry.parts is None:\n            return None", "if entry.parts is None:\n            continue"),
    ),
    _in_ledger(
        "a larger size than estimated is not charged",
        "test_room.py::test_inv18_what_turns_out_larger_is_charged_at_once",
        ("entry.parts = parts if parts is not None else entry.parts", "pass"),
    ),
    _in_cache(
        "what is over the whole budget evicts first",
        "test_room.py::test_inv18_what_is_over_the_whole_budget_is_refused_before_anything_is_evicted",
        ("            self._refuse_if_over_budget(plan)\n", ""),
    ),
    _in_ledger(
        "a forked child has what its parent loaded",
        "test_lifetimes.py::TestFork::test_inv19_the_child_starts_empty_and_closes_nothing",
        ("        call_in_forked_child(self._start_empty)\n", ""),
    ),
    _in_spec(
        "the key leaves out a field",
        "test_what_changes_what_is_loaded_changes_the_key",
        ("        spec.revision,\n", ""),
    ),
    _in_spec(
        "an adapter that was trained again is the same",
        "test_another_content_has_another_key",
        ("None if adapter is None else _adapter_digest(adapter, _adapter_signature(adapter))", "None"),
    ),
)


class _MutatedLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self._mutant.applied_to(Path(self.path).read_text(encoding="utf-8"))
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert found is not None
        assert found.origin is not None
        found.loader = _MutatedLoader(fullname, found.origin, self._mutant)
        return found


if "SWAY_MUTANT" in os.environ:
    _chosen = MUTANTS[int(os.environ["SWAY_MUTANT"])]
    assert _chosen.module not in sys.modules, f"{_chosen.module} was imported before it could be changed"
    sys.meta_path.insert(0, _Finder(_chosen))
