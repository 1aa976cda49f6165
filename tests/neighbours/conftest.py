"""Fixtures that these tests share with `tests/real`."""

from __future__ import annotations

from tests.real.conftest import adapters, base, cache

__all__ = ["adapters", "base", "cache"]
