"""Compiled programs, kept on disk: what was compiled once starts at once."""

import logging
import os
from pathlib import Path

import jax

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
