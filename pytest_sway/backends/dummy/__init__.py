"""The dummy kind: canned answers and no model."""

from __future__ import annotations

from pytest_sway.backends.dummy.backend import DummyBackend, DummyBuilder, DummyView, build_dummy

__all__ = ["DummyBackend", "DummyBuilder", "DummyView", "build_dummy"]
