"""`Owner`: whose leases are. It is apart and plain, since each run of pytest that has the plugin makes some."""

from __future__ import annotations

__tracebackhide__ = True


class Owner:
    """Whose leases are, such as a test: they end with it, whichever thread asked, and it gets no others then.

    Attributes:
        name: Who is named to others when the cache is full.
        keeps: It gives back nothing before its end, so that what it asks for meanwhile cannot wait for that.
        over: It has ended.
    """

    __slots__ = ("keeps", "name", "over")

    def __init__(self, name: str, keeps: bool = False) -> None:
        self.name = name
        self.keeps = keeps
        self.over = False
