"""The platform that a function is being traced for: some functions have a form of their own for the CPU."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def for_cpu() -> bool:
    """Returns whether the traced code will run on the CPU: jax's default backend, or what `tracing_for` says."""
    return (_asked.get() or jax.default_backend()) == "cpu"


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Traces the functions inside for a platform other than the default backend.

    Args:
      platform: jax's name of the platform, such as "tpu".
    """
    token = _asked.set(platform)
    try:
        yield
    finally:
        _asked.reset(token)
