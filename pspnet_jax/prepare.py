"""The verb `prepare`: the splits of a folder as record files for the source `prepared`."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from pspnet_jax import config as config_module
from pspnet_jax import folder_lock
from pspnet_jax.catalog import load_label_set
from pspnet_jax.data import builders
from pspnet_jax.data.folders import FolderSource
from pspnet_jax.progress import Progress

log = logging.getLogger("pspnet_jax")


def run(config: ConfigDict, *, output: str) -> Path:
    """Prepare the splits that a config names: those of training and evaluation.

    Args:
        config: of which only data and evaluate.split are used.
        output: folder that is `data.root` with `data.source=prepared`.

    Returns:
        The folder of the record files.

    Raises:
        ValueError: for a fault in the config or the data, or an output that holds another data set.
    """
    config_module.validate(config)
    data = config.data
    if data.source != "folder":
        raise ValueError(
            f"data.source={data.source}: prepare reads folders; say --config.data.source=folder"
        )
    label_set = load_label_set(data.labels)
    names = [data.train_split, data.val_split, config.evaluate.split]
    splits = {
        name: FolderSource(data.root, layout=data.layout, split=name, label_set=label_set)
        for name in dict.fromkeys(names)
        if name is not None
    }
    with (
        folder_lock.held(Path(output)),
        Progress(sum(map(len, splits.values())), "examples prepared") as progress,
    ):
        folder = builders.prepare(
            data.root,
            splits,
            Path(output),
            layout=data.layout,
            label_set=label_set,
            on_record=progress.update,
        )
    log.info("files are stored as they are, not looked into: pspnet check reads all of them")
    log.info(
        "read it with the same layout, labels and splits and --config.data.source=prepared "
        "--config.data.root=%s",
        output,
    )
    return folder
