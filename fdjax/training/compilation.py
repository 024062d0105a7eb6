"""Switches off the persistent compilation cache, and returns freed memory to the system after long compilations."""

from __future__ import annotations

import functools

import jax

from fdjax.runtime import close_heap_gaps

_COMPILED = "/jax/core/compile/backend_compile_duration"
# Compilations that take fewer seconds than this leave little freed memory behind.
_LONG_COMPILATION = 1.0


def disable_compilation_cache() -> None:
    """Switches off JAX's persistent compilation cache in this process."""
    jax.config.update("jax_enable_compilation_cache", False)


@functools.cache
def tidy_after_compilations() -> None:
    """Has `close_heap_gaps` called after every long compilation in this process."""

    def after(event: str, duration_secs: float, **_) -> None:
        if event == _COMPILED and duration_secs > _LONG_COMPILATION:
            close_heap_gaps()

    jax.monitoring.register_event_duration_secs_listener(after)
