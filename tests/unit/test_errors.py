"""The tree in the docstring of errors.py matches the classes, and each error takes only its message."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from pytest_sway import errors

_CLASSES = [error for _, error in inspect.getmembers(errors, inspect.isclass) if error.__module__ == errors.__name__]
_ERRORS = [error for error in _CLASSES if issubclass(error, errors.SwayError)]


def _drawn() -> dict[str, tuple[str, ...]]:
    """Return the bases of each error in the drawing: its parent, and the class in brackets."""
    bases: dict[str, tuple[str, ...]] = {}
    parents = ["Exception"]
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        drawn = re.match(r"^ {4}(?P<branch>[│├└─ ]*)(?P<name>\w+)(?: \((?P<also>\w+)\))?", line)
        if drawn is None:
            continue
        depth = len(drawn["branch"]) // 4
        also = (drawn["also"],) if drawn["also"] else ()
        bases[drawn["name"]] = (parents[depth], *also)
        parents[depth + 1 :] = [drawn["name"]]
    return bases


def test_the_tree_that_is_drawn_is_the_real_one() -> None:
    assert _drawn() == {error.__name__: tuple(base.__name__ for base in error.__bases__) for error in _ERRORS}


def test_the_module_has_only_the_tree_and_one_warning() -> None:
    assert [other for other in _CLASSES if other not in _ERRORS] == [errors.SwayWarning]
    assert issubclass(errors.SwayWarning, UserWarning)


@pytest.mark.parametrize("error", _ERRORS, ids=lambda error: error.__name__)
def test_an_error_takes_its_message_alone_and_survives_a_pickle(error: type[errors.SwayError]) -> None:
    again = pickle.loads(pickle.dumps(error("what was asked, what was found, what to do")))
    assert type(again) is error
    assert str(again) == "what was asked, what was found, what to do"


def test_what_would_fail_again_is_permanent() -> None:
    assert {error.__name__ for error in _ERRORS if error.permanent} == {
        "SpecError",
        "BackendNotAvailableError",
        "WeightsError",
        "AdapterMismatchError",
        "ModelTooLargeError",
    }
