"""Compiled programs are kept for later processes, where nobody said otherwise; steps leave no memory behind."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pspnet_jax import programs

BUDGET_SECONDS = 40

COMPILE = """
import jax, jax.numpy as jnp
from pspnet_jax import programs
programs.keep()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hit" in name else None)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


def compile_in_a_new_process(**environment) -> list[str]:
    """Number of programs found, and the folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", COMPILE]
    environment = kept | {"JAX_PLATFORMS": "cpu"} | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_what_one_process_compiled_the_next_one_finds(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert compile_in_a_new_process(**environment) == ["0", str(tmp_path / "pspnet_jax")]
    assert list((tmp_path / "pspnet_jax").glob("*-cache"))
    hits, _ = compile_in_a_new_process(**environment)
    assert int(hits) > 0


@pytest.mark.parametrize(
    ("setting", "folder"),
    [
        ({"JAX_COMPILATION_CACHE_DIR": "elsewhere"}, "elsewhere"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None"),
    ],
    ids=["folder", "off"],
)
def test_settings_of_jax_come_first(tmp_path, setting, folder):
    if "JAX_COMPILATION_CACHE_DIR" in setting:
        setting, folder = (
            {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / folder)},
            str(tmp_path / folder),
        )
    found = compile_in_a_new_process(XDG_CACHE_HOME=str(tmp_path / "unused"), **setting)
    assert found[1] == folder
    assert not (tmp_path / "unused").exists()


def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert compile_in_a_new_process(XDG_CACHE_HOME=str(tmp_path / "file")) == ["0", "None"]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_the_compiler_for_cpus_is_told_to_leave_a_pass_out(platform, monkeypatch):
    """On other devices barriers would stay in the program."""
    original, asked = jax.stages.Lowered.compile, []

    def compile_noting(lowered, compiler_options):
        asked.append(compiler_options)
        return original(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_noting)
    programs.compile_step(jax.jit(lambda x: x + 1), 1.0, platform=platform)
    left_out = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    assert asked == [left_out if platform == "cpu" else {}]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_compiling_a_step_gives_freed_memory_back():
    """What was freed below the last thing allocated stays with the process otherwise."""
    jitted = jax.jit(lambda state, batch: state + batch)
    programs.compile_step(jitted, 1.0, 2.0, platform="cpu")  # the first one starts much else
    heap = [bytes(1000) for _ in range(200_000)]
    last = heap[-1]
    before = resident_bytes()
    del heap
    kept = resident_bytes()
    compiled = programs.compile_step(jitted, 1.0, 2.0, platform="cpu")
    assert before - kept < 100e6
    assert before - resident_bytes() > 150e6
    assert compiled(1.0, 2.0) == 3.0
    assert len(last) == 1000
