"""`page`: the run record as one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from pytest_sway.report.comparisons import failures_first
from pytest_sway.report.html import words
from pytest_sway.report.html.axes import Axis
from pytest_sway.report.html.shown import Room, Shown
from pytest_sway.report.html.timeline import workers

_POLICY: Final = "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
"""The page's content security policy: it allows its one style sheet, no script and no request."""


def page(record: Mapping[str, Any]) -> str:
    """Return the page of a run.

    Args:
        record: The run record; see `pytest_sway.report.run_record`.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        name: getattr(words, name) for name in ("signed", "plain", "short", "times", "percent", "probability")
    }
    style = _own("page.css")
    comparisons, leaks, mutations = failures_first(record["comparisons"]), record["leaks"], record["mutations"]
    seconds, timeline = workers(record)
    written = environment.from_string(_own("page.html.j2")).render(
        policy=_POLICY.format(base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()),
        style=Markup(style),  # noqa: S704 # ours
        headline=words.headline(comparisons, record["run"]["exit_status"]),
        findings=words.findings(leaks, mutations),
        run=record["run"],
        facts={**record["versions"], **record["devices"]},
        specs=record["specs"],
        groups=_groups(comparisons),
        seconds=seconds,
        workers=timeline,
        leaks=leaks,
        mutations=mutations,
    )
    # HTML cannot hold a lone surrogate, and drops NUL silently.
    return written.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _own(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _groups(comparisons: Sequence[Mapping[str, Any]]) -> list[tuple[str, Axis, list[Shown]]]:
    """Return the comparisons of each unit with their common axis; failed comparisons and their units come first."""
    room = Room.among(max(len(comparisons), 1))
    units: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, each in enumerate(comparisons):
        units.setdefault(each["unit"], []).append((number, each))
    groups = []
    for unit, own in units.items():
        axis = Axis.over(_drawn(each for _, each in own))
        groups.append((unit, axis, [Shown.of(each, number, axis, room) for number, each in own]))
    return groups


def _drawn(comparisons: Iterable[Mapping[str, Any]]) -> Iterable[float | None]:
    for each in comparisons:
        yield from (each["low"], each["high"], each["margin"])
