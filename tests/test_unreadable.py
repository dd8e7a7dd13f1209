"""Training past a few unreadable images: blank, named once, bounded, the others untouched."""

import numpy as np
import pytest

from pspnet_jax.arrays import IGNORE_LABEL
from pspnet_jax.data import transforms, unreadable
from pspnet_jax.data.layouts import DataError
from pspnet_jax.data.pipeline import training_batches

from pictures import ExampleSource

BUDGET_SECONDS = 40


class Damaged(ExampleSource):
    """Six examples of which some cannot be read."""

    def __init__(self, *damaged):
        super().__init__(6)
        self.damaged = damaged

    def __getitem__(self, index):
        if index in self.damaged:
            raise DataError(f"image_{index}.jpg: the file is empty")
        return super().__getitem__(index)


def batches(source, *, share_max=1.0, num_workers=0, count=6):
    tolerant = unreadable.Tolerant(source, size=(33, 33), color=(1, 2, 3))
    options = transforms.resolve({"recipe": "semseg"})
    stream = training_batches(
        tolerant,
        transforms.make_augment(options, (33, 33), fill=(1, 2, 3)),
        global_batch_size=3,
        seed=0,
        first_step=0,
        num_workers=num_workers,
    )
    watched = unreadable.watched(stream, tolerant, share_max=share_max)
    try:
        return [next(watched) for _ in range(count)]
    finally:
        stream.close()


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_image_is_blank_and_the_others_are_what_they_were(num_workers):
    good, bad = batches(Damaged()), batches(Damaged(2), num_workers=num_workers)
    seen = 0
    for a, b in zip(good, bad, strict=True):
        for i in range(3):
            if a.index[i] == 2:
                seen += 1
                assert b.index[i] == -3
                assert set(np.unique(b.labels[i])) == {IGNORE_LABEL}
                assert (b.images[i] == (1, 2, 3)).all()
            else:
                assert b.index[i] == a.index[i]
                np.testing.assert_array_equal(b.images[i], a.images[i])
                np.testing.assert_array_equal(b.labels[i], a.labels[i])
    assert seen == 3


def test_each_is_named_once(said):
    batches(Damaged(2, 4))
    assert sorted(said) == [
        f"left out of training: image_{i}.jpg: the file is empty" for i in (2, 4)
    ]


def test_too_many_stop_the_training():
    assert len(batches(Damaged(2), share_max=0.17)) == 6
    message = (
        r"1 of 6 training images cannot be read, more than data.unreadable_share_max=0.1; "
        r"`pspnet check` lists all of them. The last: image_2.jpg: the file is empty"
    )
    with pytest.raises(DataError, match=message):
        batches(Damaged(2), share_max=0.1)
