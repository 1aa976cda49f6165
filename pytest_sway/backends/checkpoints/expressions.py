"""Check the expressions in an adapter's config, which PEFT matches against the names of all modules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.errors import SpecError
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__tracebackhide__ = True

_EXPRESSIONS: Final = ("target_modules", "exclude_modules", "layers_pattern")
_KEYED_BY_EXPRESSIONS: Final = ("rank_pattern", "alpha_pattern")
_QUANTIFIER_IN_GROUP: Final = re.compile(r"\)(\*|\+|\{\d*,)")
_LONGEST_EXPRESSION: Final = 2**16
_PATIENCE: Final = 4.0
"""The most seconds for matching an expression with the names of all modules; usually it takes a millisecond."""
_MATCH: Final = (
    "import json, re, sys; expression, names = json.load(sys.stdin); e = re.compile(expression);"
    "[(e.fullmatch(name), e.match(name)) for name in names]"
)


def expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the expressions in an adapter's config, each after its field."""
    for field in _EXPRESSIONS:
        value = config.get(field)
        if isinstance(value, str):
            yield field, value
        elif field == "layers_pattern" and isinstance(value, list):
            yield from ((field, each) for each in value if isinstance(each, str))
    for field in _KEYED_BY_EXPRESSIONS:
        value = config.get(field)
        if isinstance(value, dict):
            yield from ((field, key) for key in value)


def require_quick(where: str, field: str, expression: str, tensors: Iterable[str]) -> None:
    """Raise if an expression takes forever to match a module's name.

    Args:
        where: The path of its file.
        field: The field that holds it.
        expression: The expression.
        tensors: The names of the tensors of all modules.

    Raises:
        SpecError: It takes forever, or is far too long.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        raise SpecError(f"{where!r} has an expression of {len(expression):,} characters as {field}. Save it again.")
    if not _QUANTIFIER_IN_GROUP.search(expression):
        return  # repeats side by side take polynomial time, and names are short
    names = {name.rpartition(".")[0] for name in tensors}
    asked = json.dumps([expression, sorted(names)])
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        subprocess.run(  # noqa: S603 # our own code; a match holds the interpreter, so no thread could end it
            command, input=asked, text=True, capture_output=True, timeout=_PATIENCE, check=False, env=dict(os.environ)
        )
    except subprocess.TimeoutExpired:
        raise SpecError(
            f"{where!r} has the expression {shown(expression)} as {field}, which takes more than {_PATIENCE:g} s to"
            " match the names of the modules: its repeats backtrack into each other. Write it without a repeat inside"
            " of a repeat, or list the modules by name."
        ) from None
