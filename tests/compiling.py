"""What is compiled meanwhile."""

import contextlib

import jax


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
