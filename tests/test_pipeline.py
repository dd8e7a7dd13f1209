"""One global stream of batches, whatever the workers and wherever it starts."""

import itertools

import jax
import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data.folders import FolderSource
from pspnet_jax.data.layouts import DataError
from pspnet_jax.data.pipeline import evaluation_examples, open_source, training_batches

from pictures import AUGMENT, ExampleSource, write_split

BUDGET_SECONDS = 60


def batches(count, *, source=None, first_step=0, num_workers=0, seed=7, size=4):
    stream = training_batches(
        ExampleSource(10) if source is None else source,
        AUGMENT,
        global_batch_size=size,
        seed=seed,
        first_step=first_step,
        num_workers=num_workers,
    )
    return list(itertools.islice(stream, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_have_their_shapes():
    (batch,) = batches(1)
    assert batch.images.shape == (4, 33, 33, 3)
    assert batch.labels.shape == (4, 33, 33)
    assert batch.images.dtype == batch.labels.dtype == np.uint8
    assert batch.index.dtype == np.int32
    assert batch.valid.all()


def test_same_seed_same_batches_and_another_seed_others():
    assert_same(batches(4), batches(4))
    assert not np.array_equal(batches(1)[0].images, batches(1, seed=8)[0].images)


def test_every_epoch_is_a_permutation_and_they_differ():
    indices = np.concatenate([batch.index for batch in batches(10)])
    epochs = indices.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_augmentation_differs_between_epochs():
    stream = batches(5, source=ExampleSource(2), size=2)
    views = [batch.images[list(batch.index).index(0)].tobytes() for batch in stream]
    assert len(set(views)) == 5


def test_starting_later_is_skipping():
    assert_same(batches(6)[4:], batches(2, first_step=4))


def test_skipped_examples_are_never_read():
    reads = []

    class Counting(ExampleSource):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    batches(1, source=Counting(10), first_step=100_000)
    assert len(reads) < 50


def test_worker_processes_change_nothing():
    assert_same(batches(5), batches(5, num_workers=2))


@pytest.mark.parametrize(
    ("num_processes", "num_workers"),
    [
        (2, 0),
        (4, 0),
        (2, 1),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 3), (4, 1), (4, 3))),
    ],
)
def test_processes_share_the_stream(monkeypatch, num_processes, num_workers):
    """Byte for byte what one process without workers loads."""
    whole = batches(3)
    shares = []
    for process in range(num_processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: num_processes)
        shares.append(batches(3, num_workers=num_workers))
    for step, batch in enumerate(whole):
        together = [np.concatenate(x) for x in zip(*(share[step] for share in shares), strict=True)]
        assert_same(tuple(together), tuple(batch))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_photograph_is_named(tmp_path, num_workers):
    write_split(tmp_path, "train", 3)
    path = tmp_path / "images/train/train_0001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    source = FolderSource(
        str(tmp_path), layout="camvid", split="train", label_set=load_label_set("camvid")
    )
    with pytest.raises(DataError, match=r"train_0001\.jpg: cannot be decoded"):
        batches(3, source=source, num_workers=num_workers)


def test_evaluation_reads_every_example_once_in_order():
    source = ExampleSource(7, sizes=((40, 50), (30, 60)))
    read = list(evaluation_examples(source))
    assert [int(example.index) for example in read] == list(range(7))
    assert [example.labels.shape for example in read[:2]] == [(40, 50), (30, 60)]


def test_open_source_knows_both_kinds(tmp_path):
    write_split(tmp_path, "val", 2)
    camvid = load_label_set("camvid")
    folder = open_source(
        "folder", split="val", label_set=camvid, layout="camvid", root=str(tmp_path)
    )
    scenes = load_label_set("scenes")
    painted = open_source("scenes", split="val", label_set=scenes, layout="camvid", root=None)
    assert (len(folder), len(painted)) == (2, 200)


def test_scenes_refuse_files_and_classes_that_they_would_not_use(tmp_path):
    for name, root in (("camvid", None), ("scenes", str(tmp_path))):
        with pytest.raises(DataError, match=r"for files on disk say --config\.data\.source=folder"):
            open_source(
                "scenes", split="val", label_set=load_label_set(name), layout="pairs", root=root
            )
