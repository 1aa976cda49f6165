"""`Owner`, the test or fixture that owns leases. It is a module of its own since every run of tests imports it."""

from __future__ import annotations

__tracebackhide__ = True


class Owner:
    """A test or fixture that owns leases. They end with it, whichever thread took them, and it gets no others.

    Attributes:
        name: The name that messages show when the cache is full.
        keeps: Whether it releases nothing before its end, so its own requests must not wait for its leases.
        over: Whether it has ended.
    """

    __slots__ = ("keeps", "name", "over")

    def __init__(self, name: str, keeps: bool = False) -> None:
        self.name = name
        self.keeps = keeps
        self.over = False
