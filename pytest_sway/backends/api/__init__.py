"""Backends of kind ``api``: a base and its tuned self as two models on OpenAI-compatible servers.

Nothing is loaded here; what stands for a load is to ask the servers whether they serve both models, and whether the
two differ.
"""

from pytest_sway.backends.api.builder import ApiBuilder, build_api, check_api

__all__ = ["ApiBuilder", "build_api", "check_api"]
