"""Which state of the project an experiment measured."""

import subprocess
from pathlib import Path


def commit_of_checkout() -> str:
    """Of the checkout this file lies in, marked where it was changed; 'unknown' outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
