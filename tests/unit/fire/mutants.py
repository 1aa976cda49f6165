"""A table of bugs that such systems really had, and of the tests that kill them.

As a plugin (``pytest -p tests.unit.fire.mutants``), this module puts the bug in the environment variable SWAY_MUTANT
into its module during the import. It changes the syntax tree, so comments and layout make no difference.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """A bug, the changes that make it, and the test that finds it.

    Attributes:
        bug: The bug, in words.
        module: The module that gets it.
        changes: Its changes: a function, method or constant; an expression or statement in it; and the replacement.
            In the expression, ``...`` matches anything, including all arguments of a call.
        killer: The test that fails.
    """

    bug: str
    module: str
    changes: tuple[tuple[str, str, str], ...]
    killer: str

    def applied_to(self, source: str) -> ast.Module:
        tree = ast.parse(source)
        for place, old, new in self.changes:
            change = _Change(old, new)
            for found in _places(tree, place.split(".")):
                change.visit(found)
            assert change.made, f"{self.bug!r} is not made: {self.module} has no `{old}` in {place}"
        return ast.fix_missing_locations(tree)


def _places(tree: ast.AST, names: list[str]) -> Iterator[ast.AST]:
    """Yield the definitions under these names, each inside the one before."""
    if not names:
        yield tree
        return
    for node in ast.iter_child_nodes(tree):
        assigned = [part.id for part in ast.iter_child_nodes(node) if isinstance(part, ast.Name)]
        if names[0] in (getattr(node, "name", None), *assigned):
            yield from _places(node, names[1:])


class _Change(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = _parsed(old), new
        self.made = 0

    def visit(self, node: ast.AST) -> Any:
        if not _alike(self._old, node):
            return self.generic_visit(node)
        self.made += 1
        return _parsed(self._new)


def _parsed(code: str) -> ast.AST:
    """Parse a statement, or an expression."""
    [statement] = ast.parse(code).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _alike(pattern: Any, found: Any) -> bool:
    if isinstance(pattern, ast.AST):
        fields = (_alike(getattr(pattern, name), getattr(found, name, None)) for name in pattern._fields)
        return _is_anything(pattern) or (type(pattern) is type(found) and all(fields))
    if isinstance(pattern, list):
        return any(map(_is_anything, pattern)) or (len(pattern) == len(found) and all(map(_alike, pattern, found)))
    return bool(pattern == found)


def _is_anything(pattern: Any) -> bool:
    return isinstance(pattern, ast.Constant) and pattern.value is ...


def _read(row: str) -> Mutant:
    bug, *changes, killer = (line.strip() for line in row.splitlines())
    module = changes[0].partition(":")[0]
    inside = [change.removeprefix(f"{module}:").partition(": ") for change in changes]
    return Mutant(
        bug,
        f"pytest_sway.{module}",
        tuple((place, *change.split(" -> ")) for place, _, change in inside),  # type: ignore[misc]
        f"tests/unit/{killer}",
    )


# Each entry: the bug in words, its changes (place: old -> new), and its killer.
_TABLE = """\
the victim is chosen among leased entries too
    cache.entries:Entry.idle: not self.claims -> True
    cache/test_closing.py::test_inv02_what_is_leased_is_not_closed_to_make_room
an entry is evicted while it loads
    cache.entries:Entry.idle: self.state is State.READY -> self.state in (State.LOADING, State.READY)
    cache/test_room.py::test_inv07_what_is_loading_is_never_a_victim
room is credited before the close returns
    cache.entries:RESIDENT: State.CLOSING -> State.READY
    cache/test_room.py::test_inv04_what_another_thread_is_closing_counts
room is made after the load
    cache.backend_cache:BackendCache._load: self._make_room(...) -> None
    cache.backend_cache:BackendCache._build_in_memory: return ... -> return self._make_room(operation, plan.sizes)
    cache/test_room.py::test_inv04_room_is_freed_before_the_load_begins
the oldest goes, not the least recently used
    cache.ledger:Ledger._hit: self._entries.move_to_end(...) -> None
    cache/test_room.py::test_inv07_the_victim_is_the_least_recently_used
a second request during a load starts another load
    cache.ledger:Ledger.try_to_claim: entry is None -> entry is None or entry.state is State.LOADING
    cache/test_loading.py::test_inv01_all_waiters_for_a_load_get_its_object
a waiter holds no lease when the entry becomes ready
    cache.ledger:Ledger.admit: waiter.lease = ... -> pass
    cache/test_loading.py::test_inv05_leases_of_waiters_exist_when_the_entry_becomes_ready
a waiter is not woken by the load
    cache.ledger:Ledger.admit: self._announce() -> None
    cache/test_loading.py::test_inv01_all_waiters_for_a_load_get_its_object
a waiter does not get the failure
    cache.ledger:Ledger._refuse: waiter.error = ... -> pass
    cache/test_loading.py::test_inv09_leader_and_waiters_get_the_error_of_one_load_and_the_next_call_tries_again
a waiter is not woken by a failure or an interrupt
    cache.ledger:Ledger.undo: self._announce() -> None
    cache/test_loading.py::test_inv10_an_interrupt_goes_up_where_it_struck_and_a_waiter_takes_over
a failed load stays in the cache
    cache.ledger:Ledger.undo: State.LOADING -> State.QUEUED
    cache/test_loading.py::test_inv09_a_failed_load_leaves_its_room_to_others
an interrupted load keeps its reservation
    cache.backend_cache:BackendCache._acquire: BaseException -> Exception
    cache/test_loading.py::test_inv10_an_interrupt_goes_up_where_it_struck_and_a_waiter_takes_over
a closing backend is handed out
    cache.ledger:Ledger.try_to_claim: entry.state is State.READY -> entry.state in (State.READY, State.CLOSING)
    cache/test_closing.py::test_inv06_a_request_for_a_closing_backend_waits_and_gets_a_new_one
a stale release hits the next generation
    cache.ledger:Ledger.unclaim: entry.claims.discard(...) -> self._entries.get(entry.key, entry).claims.clear()
    cache/test_lifetimes.py::test_inv08_a_late_release_does_not_touch_the_next_generation
a second release takes another's lease
    cache.ledger:Ledger.unclaim: entry.claims.discard(...) -> entry.claims and entry.claims.pop()
    cache/test_lifetimes.py::test_inv15_releasing_twice_is_harmless
evicting all closes a leased backend
    cache.ledger:Ledger.retire: entry.idle -> True
    cache/test_closing.py::test_inv02_what_is_leased_is_closed_after_its_last_lease
a close that raises fails the request that made room
    cache.closing:Closer._call_closers: Exception -> ()
    cache/test_closing.py::test_inv11_a_close_that_raises_fails_no_other_request
a load that ends after the shutdown is kept
    cache.ledger:Ledger.admit: self._shut -> False
    cache/test_closing.py::test_inv03_a_load_that_ends_after_the_shutdown_gave_up_on_it_is_closed
a load that waits for itself waits forever
    cache.ledger:Ledger._join: any(...) -> False
    cache/test_loading.py::test_inv14_a_load_that_waits_for_itself_gets_an_error
a caller that holds all the room waits for itself
    cache.ledger:Ledger.reserve: self._budget.never_allows(...) -> False
    cache/test_room.py::test_inv17_a_request_fails_at_once_if_the_caller_holds_everything
the main thread waits for the lease of an ended thread
    cache.entries:Claim.ends_without: self.orphaned -> False
    cache/test_room.py::test_inv17_the_lease_that_a_thread_has_left_is_not_waited_for_in_the_main_thread
a test waits for a lease that another of its threads keeps
    cache.entries:Claim.ends_without: self.owner.keeps -> False
    cache/test_room.py::test_inv17_what_a_test_keeps_to_its_end_is_its_own_in_all_its_threads
a load in progress when its test ends is pinned
    cache.backend_cache:BackendCache._acquire: owner.over -> False
    cache/test_lifetimes.py::TestOwner::test_inv17_a_load_under_way_at_its_end_is_pinned_by_nobody
the end of a test ends the leases of another
    cache.ledger:Ledger.unclaim_all: claim.owner is owner -> True
    cache/test_lifetimes.py::TestOwner::test_inv17_its_leases_end_with_it_however_they_are_kept
the base is closed while room is made for its next adapter
    cache.backend_cache:BackendCache._load: (...).pin(...) -> self._listener.loading(spec)
    cache/test_room.py::test_inv16_a_swap_of_adapters_at_max_size_1_never_reloads_the_base
a base is closed with an adapter alive
    backends.local.pool:SharedPool._depart: slot.users.discard(...) -> slot.users.clear()
    cache/test_room.py::test_inv16_a_base_goes_with_its_last_adapter
a base is loaded twice at once
    backends.local.pool:SharedPool.acquire: holding(...) -> self._share(slot, user, load)
    backends/local/test_pool.py::test_requests_during_a_load_wait_for_it
a closing base is handed out
    backends.local.pool:SharedPool._leave: holding(...) -> self._close_unused(slot)
    backends/local/test_pool.py::test_who_asks_during_a_close_waits_for_it_and_loads_anew
a base is closed despite a new request for it
    backends.local.pool:SharedPool._give_up: not slot.users -> True
    backends/local/test_pool.py::test_who_asks_between_the_last_release_and_the_close_keeps_the_value
a shared base is counted for each adapter
    cache.budget:total_bytes: max(...) -> size + parts.get(part, 0)
    cache/test_room.py::test_inv16_a_shared_base_counts_once
an unknown size counts as none
    cache.budget:total_bytes: return None -> continue
    cache/test_room.py::test_inv18_an_unknown_size_counts_as_the_whole_budget
a larger size than estimated is not charged
    cache.ledger:Ledger.admit: entry.parts = ... -> pass
    cache/test_room.py::test_inv18_what_turns_out_larger_is_charged_at_once
a model over the whole budget evicts others first
    cache.backend_cache:BackendCache._load: self._refuse_if_over_budget(...) -> None
    cache/test_room.py::test_inv18_what_is_over_the_whole_budget_is_refused_before_anything_is_evicted
a forked child has its parent's entries
    cache.ledger:Ledger.__init__: call_in_forked_child(...) -> None
    cache/test_lifetimes.py::TestFork::test_inv19_the_child_starts_empty_and_closes_nothing
the key leaves out a field
    spec.identity:_settings: spec.revision -> None
    spec/test_spec.py::test_what_changes_what_is_loaded_changes_the_key
an adapter that was trained again is the same
    spec.identity:resolved_key: _adapters_digest(...) -> None
    spec/test_spec.py::test_another_content_has_another_key
"""
MUTANTS = tuple(map(_read, re.split(r"\n(?=\S)", _TABLE.rstrip())))


class _MutatedLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        mutated = self._mutant.applied_to(Path(self.path).read_text(encoding="utf-8"))
        return compile(mutated, self.path, "exec", dont_inherit=True)


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
