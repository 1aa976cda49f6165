"""pytest-sway: base model and fine-tuned model as two views on one set of loaded weights, in pytest."""

from pytest_sway.errors import SwayError, SwayWarning
from pytest_sway.spec import ModelSpec, cache_key_for

__all__ = ["ModelSpec", "SwayError", "SwayWarning", "cache_key_for"]
