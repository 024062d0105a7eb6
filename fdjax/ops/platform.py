"""Which platform a function is being traced for: some are written otherwise for the CPU."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def for_cpu() -> bool:
    """Whether what is being traced will run on the CPU: jax's default backend, unless `tracing_for` says otherwise."""
    return (_asked.get() or jax.default_backend()) == "cpu"


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Functions that are traced inside are compiled for another platform than this process computes on.

    Args:
      platform: jax's name of it, such as "tpu".
    """
    token = _asked.set(platform)
    try:
        yield
    finally:
        _asked.reset(token)
