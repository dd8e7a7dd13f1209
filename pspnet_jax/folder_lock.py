"""One process at a time in a folder."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("pspnet_jax")


@contextmanager
def held(folder: Path) -> Iterator[str]:
    """Hold a folder, which may be new, against other processes. The system lets go of it however this process ends.

    Yields:
        The process that held it before and did not let go of it, because it was killed; '' where there is none.

    Raises:
        ValueError: naming the process that holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}; name another folder") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): let nothing else write there", folder, error)
        file.seek(0)
        before = file.read().strip()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield before
        finally:
            file.truncate(0)
