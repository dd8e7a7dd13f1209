"""Config files of this project, as experiments read them."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def load(path: Path | str) -> ConfigDict:
    """What a file's `get_config()` returns."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
