"""What evaluation servers of benchmarks accept: the ids in the files and the names of the files.

* Cityscapes (cityscapesScripts, evalPixelLevelSemanticLabeling): one channel of label ids (road is 7), of
  the size of the image; the file of FRAME = CITY_123456_123456 is found anywhere in the archive as FRAME*.png,
  and there must be one.
* ADE20K (github.com/CSAILVision/sceneparsing): one channel of 1..150, the name of the image with the ending
  .png.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from pspnet_jax.catalog import LabelSet, load_label_set


@dataclass(frozen=True)
class Submission:
    """What one benchmark wants."""

    name: str
    labels: str
    """Label set whose raw ids the files hold."""
    image_name: re.Pattern[str]
    """Of whole names of images without suffix; group 1 is the name of the file."""
    example: str

    def file_names(self, images: Sequence[Path]) -> list[str]:
        """What the files of these images are called.

        Raises:
            ValueError: naming images that are none of the benchmark's.
        """
        matches = [self.image_name.fullmatch(image.stem) for image in images]
        foreign = [str(image) for image, match in zip(images, matches, strict=True) if not match]
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise ValueError(
                f"--submission={self.name} takes images of the benchmark, named as {self.example}; "
                f"these are not: {', '.join(foreign[:5])}{more}"
            )
        return [f"{match[1]}.png" for match in matches if match]

    def raw_ids(self, label_set: LabelSet) -> UInt8[np.ndarray, "256"]:
        """Train id -> the id in the files.

        Raises:
            ValueError: where these are not the benchmark's classes.
        """
        wanted = load_label_set(self.labels)
        if label_set.names != wanted.names:
            raise ValueError(
                f"--submission={self.name} needs a checkpoint of label set '{self.labels}' with its "
                f"{wanted.num_classes} classes ({', '.join(wanted.names[:3])}, ...); this one predicts "
                f"'{label_set.name}' with {label_set.num_classes} ({', '.join(label_set.names[:3])}, ...)"
            )
        table = np.zeros(256, np.uint8)  # a class map holds nothing but train ids
        table[: wanted.num_classes] = [raw_ids[0] for raw_ids in wanted.raw_ids]
        return table


SUBMISSIONS = {
    submission.name: submission
    for submission in (
        Submission(
            "cityscapes",
            "cityscapes",
            re.compile(r"([^_]+_\d{6}_\d{6})(?:_.*)?"),
            "frankfurt_000000_000294_leftImg8bit.png",
        ),
        Submission(
            "ade20k",
            "ade20k",
            re.compile(r"(ADE_(?:train|val|test)_\d{8})"),
            "ADE_val_00000001.jpg",
        ),
    )
}


def choose(name: str) -> Submission:
    """A benchmark by name; ValueError for an unknown one."""
    if name not in SUBMISSIONS:
        raise ValueError(f"--submission={name} is not one of {', '.join(SUBMISSIONS)}")
    return SUBMISSIONS[name]
