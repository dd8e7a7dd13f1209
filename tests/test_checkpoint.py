"""Checkpoints: what is kept, what is refused, what survives damage."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import checkpoint
from pspnet_jax.checkpoint import CheckpointFolder, CorruptCheckpointError

BUDGET_SECONDS = 40


def parts(value):
    return {
        "model": {
            "params": {"head": {"kernel": jnp.full((3, 4), float(value)), "bias": jnp.arange(4.0)}},
            # More than all that Orbax writes beside it, and nothing to compress.
            "batch_stats": {"noise": jax.random.bits(jax.random.key(0), (20_000,), jnp.uint8)},
            "description": '{"width": 8}',
        },
        "optimizer": {
            "opt_state": {"0": {}, "1": {"trace": jnp.ones(2)}},
            "step": jnp.int32(value),
        },
    }


def saved(tmp_path, scores):
    """A folder with one step per (step, mean IoU)."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step, score in scores.items():
        folder.save(step, parts(step), mean_iou=score)
    folder.wait()
    return folder


def values_file(folder, step, part):
    """The largest file of a part: its array values."""
    return max(
        (folder.folder(step) / part).rglob("*"), key=lambda p: p.stat().st_size * p.is_file()
    )


def test_round_trip_is_bit_exact_and_keeps_the_description(tmp_path):
    folder = saved(tmp_path, {7: None})
    for name, part in parts(7).items():
        loaded = folder.load(7, name)
        assert jax.tree.structure(loaded) == jax.tree.structure(part)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(part), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (tmp_path / "checkpoints/00000007/model").is_dir()
    assert (tmp_path / "checkpoints/00000007/optimizer").is_dir()


def test_latest_two_and_the_best_are_kept(tmp_path):
    folder = saved(tmp_path, {1: 0.1, 2: 0.9, 3: 0.3, 4: None, 5: 0.5})
    assert folder.steps() == [2, 4, 5]
    assert (folder.best_step(), folder.latest_step()) == (2, 5)
    assert folder.record(2).mean_iou == 0.9


def test_best_is_latest_where_nothing_was_evaluated_and_the_later_of_equals(tmp_path):
    assert saved(tmp_path / "a", {1: None, 2: None}).best_step() == 2
    assert saved(tmp_path / "b", {1: 0.5, 2: 0.5}).best_step() == 2


def test_a_score_that_is_not_a_number_is_no_score(tmp_path):
    folder = saved(tmp_path, {1: 0.2, 2: float("nan")})
    assert folder.record(2).mean_iou is None
    assert folder.best_step() == 1


def test_a_score_that_comes_later(tmp_path):
    folder = saved(tmp_path, {1: 0.2, 2: None})
    folder.set_score(2, 0.3, evaluation="val-whole")
    assert folder.best_step() == 2
    folder.set_score(2, float("nan"), evaluation="val-whole")
    assert folder.record(2).mean_iou == 0.3
    assert folder.load(2, "model")
    path = folder.folder(2) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("0.3", "0.1"))
    with pytest.raises(CorruptCheckpointError, match="its score differs from the digest"):
        folder.record(2)


def test_scores_of_other_evaluations_are_not_compared(tmp_path):
    folder = saved(tmp_path, {1: None, 2: None})
    for step, score, evaluation in ((1, 0.9, "val-semseg"), (2, 0.3, "val-whole")):
        folder.set_score(step, score, evaluation=evaluation)
    assert folder.best_step() == 2
    folder.save(3, parts(3), mean_iou=None)
    folder.wait()
    folder.set_score(3, 0.2, evaluation="val-whole")
    folder.save(4, parts(4), mean_iou=None)
    folder.wait()
    assert folder.steps() == [2, 3, 4]
    path = folder.folder(3) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("val-whole", "val-semseg"))
    with pytest.raises(CorruptCheckpointError, match="its score differs from the digest"):
        folder.record(3)


def test_a_signal_while_a_save_is_waited_for_loses_nothing(tmp_path, monkeypatch):
    class Told(BaseException):
        pass

    def told(*_):
        raise Told

    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(1, parts(1), mean_iou=None)
    _, response = folder._pending
    calls = iter((told, response.result))
    monkeypatch.setattr(response, "result", lambda: next(calls)())
    with pytest.raises(Told), folder:
        folder.wait()
    assert next(calls, None) is None  # waited for once more at the end
    assert folder.steps() == [1]


def test_steps_of_older_versions_are_named_and_not_set_aside(tmp_path):
    folder = saved(tmp_path, {1: None})
    path = folder.folder(1) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"layouts"', '"other"'))
    with pytest.raises(ValueError, match="was written by an older version"):
        folder.record(1)


def test_saving_a_step_again_replaces_it(tmp_path):
    folder = saved(tmp_path, {3: 0.1})
    folder.save(3, parts(8), mean_iou=0.2)
    folder.wait()
    assert float(folder.load(3, "model")["params"]["head"]["kernel"][0, 0]) == 8


def test_caller_may_overwrite_its_arrays_while_they_are_written(tmp_path):
    folder = CheckpointFolder(tmp_path)
    tree = {"model": {"x": np.ones(1000)}}
    folder.save(1, tree, mean_iou=None)
    tree["model"]["x"][:] = 2
    folder.wait()
    np.testing.assert_array_equal(folder.load(1, "model")["x"], 1)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_detected_by_name(tmp_path, damage):
    folder = saved(tmp_path, {4: None})
    path = values_file(folder, 4, "model")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(CorruptCheckpointError, match="00000004"):
        folder.load(4, "model")
    folder.load(4, "optimizer")


def test_values_that_are_read_well_but_are_not_those_written_are_refused(tmp_path):
    """Another run's arrays in this step's folder: nothing is damaged, and all is wrong."""
    folder, other = saved(tmp_path / "a", {4: None}), CheckpointFolder(tmp_path / "b")
    other.save(4, parts(5), mean_iou=None)
    other.wait()
    shutil.rmtree(folder.folder(4) / "model")
    shutil.copytree(other.folder(4) / "model", folder.folder(4) / "model")
    with pytest.raises(CorruptCheckpointError, match=r"model: values differ from its digest"):
        folder.load(4, "model")


def test_new_step_is_verified_before_old_ones_go(tmp_path, monkeypatch):
    folder = saved(tmp_path, {1: None, 2: None})
    real = CheckpointFolder.load

    def failing(self, step, part, **options):
        if step == 3:
            raise CorruptCheckpointError("disk full")
        return real(self, step, part, **options)

    monkeypatch.setattr(CheckpointFolder, "load", failing)
    folder.save(3, parts(3), mean_iou=None)
    with pytest.raises(CorruptCheckpointError, match="disk full"):
        folder.wait()
    assert folder.steps() == [1, 2, 3]


def test_an_old_step_without_metadata_does_not_stop_new_ones(tmp_path):
    folder = saved(tmp_path, {1: 0.9, 2: 0.1})
    (folder.folder(1) / "_CHECKPOINT_METADATA").write_text("no json")
    for step in (3, 4):
        folder.save(step, parts(step), mean_iou=0.2)
    folder.wait()
    assert folder.best_step() == 4
    assert folder.steps()[-2:] == [3, 4]


def test_unfinished_steps_are_not_listed_and_are_removed(tmp_path):
    folder = saved(tmp_path, {1: None})
    unfinished = folder.path / "00000002.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert folder.steps() == [1]
    folder.remove_unfinished()
    assert not unfinished.exists()
    assert folder.steps() == [1]


def test_set_aside_renames(tmp_path):
    folder = saved(tmp_path, {1: None, 2: None})
    assert folder.set_aside(2).name == "00000002.corrupt"
    assert folder.steps() == [1]


def test_empty_folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "none")
    assert folder.steps() == []
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        folder.best_step()


def test_a_week_of_checkpoints_leaves_nothing_in_memory(tmp_path):
    """Orbax's own reading of metadata leaves seven objects of each array behind."""
    checkpoints = CheckpointFolder(tmp_path)
    many = {"params": {f"a{i:03d}": np.full(8, i, np.float32) for i in range(300)}}

    def num_objects_after(steps):
        for step in steps:
            checkpoints.save(step, parts(step) | {"many": many}, mean_iou=None)
            checkpoints.wait()
            checkpoints.load(step, "model")
        gc.collect()
        return len(gc.get_objects())

    before = num_objects_after(range(1, 4))
    assert num_objects_after(range(4, 14)) - before < 200


def test_many_arrays_are_few_for_orbax(tmp_path, monkeypatch):
    """TensorStore loses memory with every array that it opens: it is given pieces, whatever the network."""
    given = []
    save = checkpoint.ocp.save_checkpointables_async

    def noted(path, parts, **options):
        given.append({name: len(part) for name, part in parts.items()})
        return save(path, parts, **options)

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", noted)
    folder = CheckpointFolder(tmp_path)
    many = {f"a{i:03d}": np.full(8, i, np.float32) for i in range(300)}
    folder.save(1, {"model": many}, mean_iou=None)
    folder.wait()
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 1000)
    folder.save(2, {"model": many}, mean_iou=None)  # pieces end within arrays
    folder.wait()
    assert given == [{"model": 1}, {"model": 20}]
    for name, array in folder.load(2, "model").items():
        np.testing.assert_array_equal(array, many[name])
