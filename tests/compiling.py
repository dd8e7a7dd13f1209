"""Compilations: short ones, and those that happen meanwhile."""

import contextlib
import functools

import jax

# Small networks take longer to compile than to run; without LLVM's optimization a third less.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@contextlib.contextmanager
def compilations():
    """Names of what XLA compiles meanwhile."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)
