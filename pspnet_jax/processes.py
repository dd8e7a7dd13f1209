"""The processes of a training on several machines: whether there are any, and how they meet.

* A process learns of the others from variables of its environment: those of SLURM, Open MPI or a TPU slice,
  which JAX reads itself, or `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`.
* All of this happens before JAX looks for devices.
"""

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

import jax

from pspnet_jax.watchdog import end_process

log = logging.getLogger("pspnet_jax")

MODES = ("auto", "on", "off")
MEETING_SECONDS = 300
"""How long a process waits for the others at the start."""
HEARTBEAT_SECONDS = 100
"""After so long without a sign of life of one process JAX ends the others."""

_OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What JAX needs to know all of a launcher's processes, and which of it is their number. An interactive shell
# of SLURM or its batch script has only some of it: nothing was launched there.
_LAUNCHERS = {
    "SLURM": (
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
        "SLURM_NTASKS",
    ),
    "Open MPI": (("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_SIZE"),
}
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"


def meet(mode: str, *, seconds: int = MEETING_SECONDS) -> None:
    """Join the other processes, where there are any.

    Args:
        mode: 'auto': where the environment names several; 'on': always; 'off': never.
        seconds: to wait for them.

    Raises:
        ValueError: for another mode, or variables that are missing or no numbers.

    Where the others do not come the process ends with exit code 1, naming the address: JAX would abort.
    """
    if mode not in MODES:
        raise ValueError(f"--distributed={mode} is not one of {', '.join(MODES)}")
    missing = [name for name in _OWN if name not in os.environ]
    # An address alone is left over from elsewhere, or meant for JAX.
    given = [name for name in _OWN[1:] if name in os.environ]
    if mode == "auto" and missing and given:
        raise ValueError(
            f"{' and '.join(given)} set, {' and '.join(missing)} not: set all three, or --distributed=off"
        )
    if mode == "off" or (mode == "auto" and num_processes(os.environ) < 2):
        return
    known = _own_variables(os.environ)
    address = known.get("coordinator_address", "the address its launcher names")
    log.info("meeting the other processes at %s, for at most %d s", address, seconds)
    jax.config.update("jax_enable_preemption_service", True)
    alarm = threading.Timer(seconds, _give_up, [address, seconds])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed={mode}: {error} Start each process with {', '.join(_OWN)}, or by srun, mpirun "
            "or on every host of a TPU slice"
        ) from error
    finally:
        alarm.cancel()
    log.info("process %d of %d", jax.process_index(), jax.process_count())


def _give_up(address: str, seconds: int) -> None:
    end_process(
        1,
        f"error: the processes did not meet at {address} within {seconds} s: is process 0 running, can this machine "
        "reach that address, were all of them started?",
    )


def num_processes(environment: Mapping[str, str]) -> int:
    """How many processes were launched together, as far as the environment says; 1 where it says nothing."""
    if all(name in environment for name in _OWN):
        return _number(environment, "JAX_NUM_PROCESSES")
    for needed, count in _LAUNCHERS.values():
        if count in environment and all(name in environment for name in needed):
            return _number(environment, count)
    return len(environment.get(_TPU_HOSTS, "").split(","))


def _own_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """Those of `_OWN` that are set, as arguments of `jax.distributed.initialize`."""
    known: dict[str, Any] = {}
    if _OWN[0] in environment:
        known["coordinator_address"] = environment[_OWN[0]]
    for variable, argument in zip(_OWN[1:], ("num_processes", "process_id"), strict=True):
        if variable in environment:
            known[argument] = _number(environment, variable)
    return known


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name}={environment[name]} is not a number") from None
