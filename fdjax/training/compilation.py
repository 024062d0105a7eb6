"""What is done about compilations: the persistent cache switched off, the heap put in order after each."""

from __future__ import annotations

import functools

import jax

from fdjax.runtime import close_heap_gaps

_COMPILED = "/jax/core/compile/backend_compile_duration"
# Seconds from which on a compilation leaves gaps worth closing.
_LONG_COMPILATION = 1.0


def disable_compilation_cache() -> None:
    """Switches the persistent compilation cache off for this process."""
    jax.config.update("jax_enable_compilation_cache", False)


@functools.cache
def tidy_after_compilations() -> None:
    """Calls `close_heap_gaps` after every long compilation from now on."""

    def after(event: str, duration_secs: float, **_) -> None:
        if event == _COMPILED and duration_secs > _LONG_COMPILATION:
            close_heap_gaps()

    jax.monitoring.register_event_duration_secs_listener(after)
