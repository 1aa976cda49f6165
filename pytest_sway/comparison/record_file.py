"""The file format of records: JSON with one question per line, so that diffs are easy to read.

A file holds the comparisons that one test recorded, each with a header. A checksum shows whether lines were changed
later, for example by a merge that mixes two recordings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from pytest_sway.comparison.records import ANEW, DECIMALS, Identity, Record, RecordedRow
from pytest_sway.errors import RecordError
from pytest_sway.system.wording import shown

__tracebackhide__ = True

SCHEMA: Final = 1

_CONFLICT: Final = (b"<<<<<<< ", b"\n<<<<<<< ")


def encode(records: Sequence[Record]) -> str:
    """Return the text of a file: JSON with one question on each line."""
    comparisons = [_as_dict(record) for record in records]
    return "\n".join(_lines(comparisons)) + "\n"


def _lines(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "{"
    yield f'"schema": {SCHEMA},'
    yield f'"checksum": "{_checksum(comparisons)}",'
    yield '"comparisons": ['
    for at, comparison in enumerate(comparisons):
        yield "{"
        yield from (f'"{key}": {_json(value)},' for key, value in comparison.items() if key != "rows")
        yield '"rows": ['
        yield ",\n".join(map(_row_line, comparison["rows"]))
        yield "]"
        yield "}" if at == len(comparisons) - 1 else "},"
    yield "]"
    yield "}"


def _row_line(row: Mapping[str, Any]) -> str:
    cells = (f'"{key}": {_number(value) if isinstance(value, float) else _json(value)}' for key, value in row.items())
    return "{" + ", ".join(cells) + "}"


def _number(value: float) -> str:
    return f"{value:.{DECIMALS}f}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_dict(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "unit": record.unit,
        "score": record.score,
        "base": None if record.base is None else record.base._asdict(),
        "candidate": record.candidate._asdict(),
        "made_with": dict(record.made_with),
        "rows": [{k: v for k, v in row._asdict().items() if k != "tokens" or v is not None} for row in record.rows],
    }


def _checksum(comparisons: Any) -> str:
    return hashlib.sha256(json.dumps(comparisons, sort_keys=True).encode()).hexdigest()[:16]


# --- from text --------------------------------------------------------------------------------------------------------


def decode(content: bytes, where: str) -> dict[str, Record]:
    """Return the records of a file by their names.

    Args:
        content: The file's bytes.
        where: The file's name in errors.

    Raises:
        RecordError: `encode` did not write this.
    """
    if content.startswith(_CONFLICT[0]) or _CONFLICT[1] in content:
        raise RecordError(f"{where} holds a merge conflict. Keep one of the two sides as a whole. {ANEW}")
    try:
        found = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{where} is cut off or was edited by hand: it is not valid JSON ({error}). Restore the file. {ANEW}"
        ) from None
    if not isinstance(found, dict) or "schema" not in found:
        raise RecordError(f"{where} is not a record of scores: it has no schema. Restore the file. {ANEW}")
    if found["schema"] != SCHEMA or isinstance(found["schema"], bool):
        raise RecordError(
            f"{where} has schema {shown(found['schema'])}, and this pytest-sway reads {SCHEMA}. Install the version"
            f" that wrote it. {ANEW}"
        )
    try:
        records = [_record(each) for each in _checked(found["comparisons"], list, "comparisons")]
    except (KeyError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise RecordError(f"{where} was edited by hand: {what}. Restore the file. {ANEW}") from None
    if found.get("checksum") != _checksum(found["comparisons"]):
        raise RecordError(
            f"{where} was changed after it was recorded, by hand or by a merge: its checksum does not match. Restore"
            f" the file. {ANEW}"
        )
    return {record.name: record for record in records}


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _record(comparison: Any) -> Record:
    found = _checked(comparison, dict, "a comparison")
    rows = [_row(row, at) for at, row in enumerate(_checked(found["rows"], list, "rows"))]
    first: dict[str, int] = {}
    for at, row in enumerate(rows):
        if (earlier := first.setdefault(row.digest, at)) != at:
            raise ValueError(f"rows[{earlier}] and rows[{at}] are the same question, {row.digest!r} ({row.question!r})")
        if (row.base is None) != (found["base"] is None):
            raise ValueError(f"rows[{at}] has {'no' if row.base is None else 'a'} score of the base, unlike its header")
    return Record(
        _checked(found["name"], str, "name"),
        _checked(found["unit"], str, "unit"),
        _checked(found["score"], str, "score"),
        None if found["base"] is None else _identity(found["base"], "base"),
        _identity(found["candidate"], "candidate"),
        {str(key): str(value) for key, value in _checked(found["made_with"], dict, "made_with").items()},
        tuple(rows),
    )


def _row(found: Any, at: int) -> RecordedRow:
    where = f"rows[{at}]"
    row = _checked(found, dict, where)
    return RecordedRow(
        _checked(row["digest"], str, f"digest in {where}"),
        None if row["base"] is None else _finite(row["base"], f"base in {where}"),
        _finite(row["tuned"], f"tuned in {where}"),
        None if row.get("tokens") is None else int(_finite(row["tokens"], f"tokens in {where}")),
        _checked(row["question"], str, f"question in {where}"),
    )


def _identity(found: Any, what: str) -> Identity:
    fields = _checked(found, dict, what)
    digest = fields["digest"]
    name = _checked(fields["name"], str, f"name in {what}")
    return Identity(name, None if digest is None else _checked(digest, str, f"digest in {what}"))


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:  # 1e999 reads as infinity
        raise ValueError(f"{what} is {shown(value)} and not a number")
    return float(value)


def _checked(value: Any, wanted: type, what: str) -> Any:
    if not isinstance(value, wanted):
        raise ValueError(f"{what} is {shown(value)} and not a {wanted.__name__}")
    return value
