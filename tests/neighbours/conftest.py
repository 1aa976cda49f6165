"""What the tests beside other tools share with those on the real model."""

from __future__ import annotations

from tests.real.conftest import adapters, base, cache

__all__ = ["adapters", "base", "cache"]
