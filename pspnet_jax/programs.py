"""Compiled programs: how a training step is compiled, and the folder in which all are kept."""

import ctypes
import logging
import os
from pathlib import Path

import jax
from jax import stages

from pspnet_jax.resample import Platform

log = logging.getLogger("pspnet_jax")


def keep() -> None:
    """Keep what XLA compiles in $XDG_CACHE_HOME/pspnet_jax (else ~/.cache/pspnet_jax) for later processes.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. A program is found again by its text, JAX's version and
    the device, so nothing in the folder can be out of date; it may be deleted at any time.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pspnet_jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # a read-only home, or none
        log.info(
            "compiled programs are not kept (%s); JAX_COMPILATION_CACHE_DIR names a folder", error
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_step(step: stages.Wrapped, *arguments: object, platform: Platform) -> stages.Compiled:
    """A jitted training step, compiled for arguments of these shapes.

    * On CPUs, XLA removes barriers before it joins equal operations: what is to be computed again in the
      backward pass would be stored all the same. It is told not to.
    * What compiling took is given back to the system, which glibc would keep.

    Args:
        platform: of the devices.
    """
    options: dict[str, bool | str] = {}
    if platform == "cpu":
        options["xla_disable_hlo_passes"] = "cse_barrier_expander"
    compiled = step.lower(*arguments).compile(compiler_options=options)
    _give_back_memory()
    return compiled


def _give_back_memory() -> None:
    """To the system, what was freed; nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
