"""A run as a whole: files, resuming bit for bit, and faults that lose nothing."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import compose as compose_module
from pspnet_jax import load, parallel
from pspnet_jax import run as run_module
from pspnet_jax.catalog import load_label_set
from pspnet_jax.checkpoint import CheckpointFolder, CorruptCheckpointError
from pspnet_jax.compose import compose
from pspnet_jax.config import default_config, from_json, scale_to_batch, to_json, validate
from pspnet_jax.data.layouts import DataError
from pspnet_jax.skipped_steps import NotFiniteError
from pspnet_jax.train import train

from pictures import write_split
from tiny_config import get_config
from training import rows

BUDGET_SECONDS = 300

CAMVID = load_label_set("camvid")


def tiny(data, **overrides):
    config = get_config()
    config.data.root = str(data)
    for name, value in overrides.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An uninterrupted run of six steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(data), workdir)
    return workdir


def digests(workdir, step):
    return CheckpointFolder(workdir / "checkpoints").record(step).digests


class KilledError(Exception):
    """Stands for a kill at a certain step."""


def interrupt_at(monkeypatch, step):
    """Make the run die when it asks for the batch of `step`."""
    real = run_module.training_batches

    def dying(*args, first_step, **options):
        for i, batch in enumerate(real(*args, first_step=first_step, **options), first_step + 1):
            if i == step:
                raise KilledError
            yield batch

    monkeypatch.setattr(run_module, "training_batches", dying)


def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "log.txt",
        "evaluation",
    }
    folders = sorted(path.name for path in (finished / "evaluation").iterdir())
    assert folders == ["00000004-val-whole", "00000006-val-whole"]
    assert set(CheckpointFolder(finished / "checkpoints").steps()) >= {4, 6}
    text = (finished / "log.txt").read_text()
    assert "step 6/6  loss" in text
    assert "protocol whole (with mirror images; " in text
    for folder in folders:  # one line each; the command line prints the other paths at the end
        assert len(re.findall(f"report: .*/{folder}/report.html", text)) == 1
        assert f"{folder}/report.md" not in text


def test_the_log_alone_gives_the_run_again(finished, tmp_path):
    """Versions, command, machine and the whole config stand in it, and what became of every checkpoint."""
    text = (finished / "log.txt").read_text()
    (config,) = re.findall(r"DEBUG config: (.*)", text)
    train(from_json(config), tmp_path)
    assert digests(tmp_path, 6) == digests(finished, 6)
    assert "DEBUG command: " in text
    assert re.search(r"process 0 of 1 .+ Python 3\.\d+.+pspnet_jax \d.+jax \d", text)
    for step in (2, 4, 6):
        assert f"step {step} is saved and was read back" in text


def test_a_run_that_diverges_ends_and_names_its_images(data, tmp_path):
    options = {"train__skipped_in_a_row_max": 3, "train__log_every_steps": 1}
    with pytest.raises(NotFiniteError, match="3 steps in a row, up to step "):
        train(tiny(data, optimizer__learning_rate=1e30, **options), tmp_path)
    lines = re.findall(
        r"step (\d+) changed nothing: .* images: (.*)", (tmp_path / "log.txt").read_text()
    )
    assert len(lines) == 3
    assert {len(names.split(", ")) for _, names in lines} == {8}
    known = {path.stem for path in data.rglob("*.*")}
    assert set(lines[0][1].split(", ")) <= known


def test_what_diverged_is_not_saved_and_a_lower_rate_goes_on(data, tmp_path, finished):
    """Step 1 blows the parameters up; step 2, at which a checkpoint was due, and all after it change nothing."""
    with pytest.raises(NotFiniteError, match="goes on from the newest checkpoint"):
        train(tiny(data, optimizer__learning_rate=1e30, train__skipped_in_a_row_max=4), tmp_path)
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == []
    train(tiny(data), tmp_path)
    assert digests(tmp_path, 6) == digests(finished, 6)


def test_rows_hold_losses_and_evaluations(finished):
    found = rows(finished)
    assert [row["step"] for row in found] == [2, 4, 4, 6, 6]
    assert {"loss", "main_loss", "aux_loss", "learning_rate", "skipped_steps"} <= set(found[0])
    report = json.loads((finished / "evaluation/00000006-val-whole/report.json").read_text())
    assert found[-1]["evaluation/whole/mean_iou"] == report["mean_iou"]
    assert report["checkpoint"]["digest"] == digests(finished, 6)["model"]


def test_config_json_holds_resolved_values(finished):
    config = from_json((finished / "config.json").read_text())
    assert config.model.pyramid_bins == (1, 2, 3, 6)
    assert config.model.stem == "deep"
    assert config.augment.scale_max == 2.0
    assert config.data.crop_size == (33, 33)
    assert config.evaluate.split == "val"


@pytest.mark.parametrize("protocol", ["whole", "semseg"])
def test_a_resolved_config_composes_the_same_run(data, tmp_path, protocol):
    config = tiny(data, evaluate__protocol=protocol, evaluate__flip=False)
    run = compose(config, tmp_path / "a")
    again = compose(from_json(to_json(run.config)), tmp_path / "b")
    assert again.description == run.description
    assert run.description.protocol.flip is False


@pytest.mark.slow
def test_the_variant_trains_and_says_how_well_it_tells_presence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.Run, "evaluate", lambda *_, heard: None)  # takes long to compile
    config = tiny(
        data,
        model__family="lextal",
        data__crop_size=(32, 32),
        loss__aux_weight=0.4,
        loss__class_weights=tuple(range(1, 12)),
        optimizer__name="adam",
        optimizer__schedule="multistep",
        optimizer__milestones=(1,),
        train__num_steps=2,
    )
    train(config, tmp_path)
    found = from_json((tmp_path / "config.json").read_text())
    assert found.model.aux_heads == ("pixel", "presence")
    assert found.loss.presence_weight == 1.0
    last = [row for row in rows(tmp_path) if "presence_loss" in row][-1]
    assert last["loss"] == pytest.approx(
        last["main_loss"] + 0.4 * last["aux_loss"] + last["presence_loss"], rel=1e-5
    )
    assert 0 <= last["presence_accuracy"] <= 1
    assert last["learning_rate"] == pytest.approx(0.001)
    assert "presence" in (tmp_path / "log.txt").read_text()
    config.loss.class_weights = (1.0, 2.0)
    with pytest.raises(ValueError, match="has 2 factors, label set 'camvid' has 11 classes"):
        compose(config, tmp_path / "other")


def test_windows_have_the_crop_of_the_training(finished, data, tmp_path):
    run = compose(tiny(data, evaluate__protocol="semseg"), tmp_path)
    assert run.description.protocol.crop_size == run.config.evaluate.crop_size == (33, 33)
    assert run.config.evaluate.stride == (22, 22)
    assert run.config.evaluate.base_size == 512
    # Also where the run itself was evaluated on whole images.
    segmenter = load(finished)
    chosen = segmenter.choose_protocol("semseg")
    assert chosen.crop_size == (33, 33)
    assert chosen.label(segmenter.label_set) == "semseg"
    run = compose(tiny(data, evaluate__protocol="semseg", evaluate__crop_size=(41, 33)), tmp_path)
    assert run.description.protocol.label(run.description.label_set) == "semseg-crop41x33"


@pytest.mark.parametrize("step", [4, 5])
def test_interrupted_equals_uninterrupted_bit_for_bit(finished, data, tmp_path, monkeypatch, step):
    """Ended by an exception before `step`: in the middle between two checkpoints, right after one."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(KilledError):
            train(tiny(data), tmp_path)
    restored = CheckpointFolder(tmp_path / "checkpoints").latest_step()
    assert restored < step
    train(tiny(data), tmp_path)
    assert digests(tmp_path, 6) == digests(finished, 6)
    assert rows(tmp_path) == rows(finished)
    assert f"resuming from step {restored}" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_workers_do_not_change_the_run(finished, data, tmp_path):
    train(tiny(data, data__num_workers=1), tmp_path)
    assert digests(tmp_path, 6) == digests(finished, 6)


def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_the_same(finished, data, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    damage(CheckpointFolder(workdir / "checkpoints"), 6)
    train(tiny(data), workdir)
    assert (workdir / "checkpoints/00000006.corrupt").is_dir()
    assert digests(workdir, 6) == digests(finished, 6)
    assert rows(workdir) == rows(finished)


def damage(folder, step):
    largest = max(
        (folder.folder(step) / "model").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])


def test_an_interrupt_while_evaluating_loses_no_step(data, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.evaluate, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from step 1"):
        train(tiny(data, train__num_steps=1), tmp_path)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.steps() == [1]
    with pytest.raises(KeyboardInterrupt):  # the same on resuming: what is there stays
        train(tiny(data, train__num_steps=1), tmp_path)
    assert folder.load(1, "model")
    monkeypatch.undo()
    train(tiny(data, train__num_steps=1), tmp_path)
    report = json.loads((tmp_path / "evaluation/00000001-val-whole/report.json").read_text())
    assert folder.record(1).mean_iou == report["mean_iou"]


def test_an_end_between_report_and_score_leaves_no_row_twice(finished, data, tmp_path, monkeypatch):
    def ended(*_, **__):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "set_score", ended)
        with pytest.raises(KilledError):
            train(tiny(data), tmp_path)
    train(tiny(data), tmp_path)
    assert rows(tmp_path) == rows(finished)
    folders = [CheckpointFolder(path / "checkpoints") for path in (finished, tmp_path)]
    assert len({folder.record(4).mean_iou for folder in folders}) == 1


def test_where_no_checkpoint_can_be_read_nothing_is_started_anew(finished, data, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    folder = CheckpointFolder(workdir / "checkpoints")
    steps, before = folder.steps(), rows(workdir)
    for step in steps:
        damage(folder, step)
    with pytest.raises(CorruptCheckpointError, match="move the folder away to start anew"):
        train(tiny(data), workdir)
    assert (folder.steps(), rows(workdir)) == (steps, before)


def test_fewer_steps_than_were_taken_are_refused(finished, data):
    with pytest.raises(ValueError, match=r"is at step 6, beyond train\.num_steps=4"):
        train(tiny(data, train__num_steps=4), finished)


def test_a_finished_run_stays_as_it_is(finished, data):
    before = rows(finished), digests(finished, 6)
    folder = train(tiny(data), finished)
    assert (rows(finished), digests(finished, 6)) == before
    assert (folder / "report.json").is_file()


def test_another_network_in_the_folder_is_refused_and_nothing_is_lost(finished, data):
    before = (finished / "config.json").read_text(), rows(finished)
    with pytest.raises(
        ValueError, match=r"holds another network:\n  .*'camvid' with 11 classes there"
    ):
        train(tiny(data, data__labels="ade20k"), finished)
    with pytest.raises(ValueError, match=r"model\.width is 8 there, 16 here"):
        train(tiny(data, model__width=16), finished)
    with pytest.raises(ValueError, match=r"first_block_dilation is \(2, 4\) there, \(1, 1\) here"):
        train(tiny(data, model__first_block_dilation=(1, 1)), finished)
    assert ((finished / "config.json").read_text(), rows(finished)) == before
    assert digests(finished, 6)


def test_another_optimizer_is_refused(finished, data):
    with pytest.raises(ValueError, match=r"of another optimizer than optimizer\.name=adam: choose"):
        train(tiny(data, optimizer__name="adam"), finished)


def test_a_changed_label_set_is_said(data, tmp_path):
    names = CAMVID.names

    def labels(color, names=names, void="11"):
        rows = [f"{i},{name},{color},{i},0,{i}" for i, name in enumerate(names)]
        text = "\n".join(["id,name,red,green,blue,raw_ids", *rows, f"255,void,,,,{void}"])
        (tmp_path / "mine.csv").write_text(text)
        return tiny(data, data__labels=str(tmp_path / "mine.csv"), train__num_steps=1)

    train(labels(1), tmp_path / "run")
    evaluation = CheckpointFolder(tmp_path / "run/checkpoints").record(1).evaluation
    assert evaluation == f"val-whole {load_label_set(str(tmp_path / 'mine.csv')).digest}"
    train(labels(2, void="11 77"), tmp_path / "run")
    said = (tmp_path / "run/log.txt").read_text()
    assert "a changed label set: color of 0: (1, 0, 0) -> (2, 0, 0), color of 1:" in said
    with pytest.raises(ValueError, match=r"with 11 here: name of 0: sky -> heaven, color of 0"):
        train(labels(2, names=("heaven", *names[1:])), tmp_path / "run")


def test_statistics_that_are_not_finite_are_not_saved(finished, data, tmp_path):
    run = compose(tiny(data), tmp_path / "run")
    state = run.initial_state(np.random.default_rng(0))
    statistics = jax.tree.map(jnp.asarray, state.batch_stats)
    norm = statistics["backbone"]["layer1_0"]["norm1"]
    norm["variance"] = norm["variance"].at[2].set(jnp.inf)
    with pytest.raises(ValueError, match=r"after step 4 1 batch statistics .*layer1_0\.norm1\.var"):
        run.save(4, dataclasses.replace(state, batch_stats=statistics))
    assert run.checkpoints.steps() == []


def test_a_validation_mask_that_cannot_be_read_stops_only_the_last_evaluation(tmp_path):
    for split, count in (("train", 5), ("val", 60)):
        write_split(tmp_path, split, count)
    data = sorted((tmp_path / "annotations/val").iterdir())
    drawn = np.random.default_rng(0).permutation(60)[:9]
    unseen = next(i for i in range(3, 60) if i not in drawn)  # by the look before the first step
    good = data[unseen].read_bytes()
    data[unseen].write_bytes(b"")
    config = tiny(tmp_path)
    with pytest.raises(DataError, match=f"{data[unseen].name}: the file is empty"):
        train(config, tmp_path / "run")
    assert "step 4 is not evaluated, training goes on" in (tmp_path / "run/log.txt").read_text()
    assert CheckpointFolder(tmp_path / "run/checkpoints").latest_step() == 6
    data[unseen].write_bytes(good)
    assert (train(config, tmp_path / "run") / "report.json").is_file()


def test_changed_options_are_said(finished, data, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    train(tiny(data, train__log_every_steps=3), workdir)
    assert "train.log_every_steps: 2 -> 3" in (workdir / "log.txt").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"data__crop_size": (480, 473)},
            r"crop_size.* 480 .* must be 8k \+ 1, with a whole k \(nearest: 473, 481\)",
        ),
        ({"train__global_batch_size": 12}, "multiple of the 8 devices"),
        ({"optimizer__momentum": 1.0}, "optimizer.momentum=1.0 must be within"),
        ({"model__backbone": "resnet20"}, "backbone='resnet20' is not one of"),
        ({"data__labels": "canvid"}, "did you mean 'camvid'"),
        ({"data__train_split": "traning"}, "does not hold the split 'traning'"),
    ],
)
def test_faults_are_found_before_anything_is_written(data, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        compose(tiny(data, **override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_seed_changes_initialization_and_order(finished, data, tmp_path):
    config = tiny(data, train__num_steps=2)
    config.seed = 1
    train(config, tmp_path)
    assert rows(tmp_path)[0]["loss"] != rows(finished)[0]["loss"]


def test_poly_schedule_ends_at_the_last_step(finished):
    rates = [row["learning_rate"] for row in rows(finished) if "loss" in row]
    expected = [0.01 * (1 - step / 6) ** 0.9 for step in (1, 3, 5)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_learning_rate_and_steps_follow_the_batch(data, tmp_path):
    config = tiny(
        data,
        train__recipe_batch_size=32,
        train__num_steps=10,
        train__evaluate_every_steps=5,
        optimizer__warmup_steps=3,
        optimizer__schedule="multistep",
        optimizer__milestones=(6, 8),
    )
    run = compose(config, tmp_path)
    optimizer, steps = run.config.optimizer, run.config.train
    assert optimizer.learning_rate == pytest.approx(0.01 * 8 / 32)
    assert (optimizer.warmup_steps, optimizer.milestones) == (12, (24, 32))
    assert (steps.num_steps, steps.evaluate_every_steps) == (40, 20)
    assert steps.recipe_batch_size == 8  # what config.json holds is not scaled again
    assert "from a batch of 32 to one of 8 images" in run.what_was_scaled
    assert "optimizer.learning_rate: 0.01 -> 0.0025" in run.what_was_scaled
    assert config.train.num_steps == 10  # the caller's is left alone


@pytest.mark.parametrize("warmup_steps", [9, 10])
def test_a_warmup_that_is_never_over_is_told(data, tmp_path, caplog, warmup_steps):
    config = tiny(data, train__num_steps=10, optimizer__warmup_steps=warmup_steps)
    compose(config, tmp_path).announce(first_step=0)
    told = "rises at the end: optimizer.warmup_steps=10 of train.num_steps=10" in caplog.text
    assert told == (warmup_steps == 10)


def test_accumulation_says_what_it_does_not_accumulate(data, tmp_path):
    config = tiny(data, train__accumulate_steps=2, train__global_batch_size=16, train__num_steps=1)
    train(config, tmp_path)
    text = (tmp_path / "log.txt").read_text()
    assert "2 parts of 8 images go through one after the other" in text
    assert "batch statistics are those of a part" in text
    config = tiny(data, train__accumulate_steps=2, loss__ohem_threshold=0.7)
    config.train.global_batch_size = 16
    with pytest.raises(
        ValueError, match=r"ohem_threshold=0.7 chooses the hardest pixels of a whole"
    ):
        compose(config, tmp_path)


def test_milestones_that_meet_become_one(data):
    config = tiny(data, train__recipe_batch_size=2, optimizer__milestones=(2, 3, 4, 40))
    scale_to_batch(config)
    assert config.optimizer.milestones == (1, 10)
    validate(config)


@pytest.mark.slow
def test_going_on_with_other_weight_decay_and_an_older_config(finished, data, tmp_path):
    """The optimizer's state does not depend on it; options that did not exist are not reported."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    stored = json.loads((workdir / "config.json").read_text())
    for section, name in (("loss", "label_smoothing"), ("train", "accumulate_steps")):
        del stored[section][name]
    (workdir / "config.json").write_text(json.dumps(stored))
    config = tiny(data, train__num_steps=7, optimizer__decay_norm_and_bias=False)
    train(config, workdir)
    assert rows(workdir)[-1]["step"] == 7
    text = (workdir / "log.txt").read_text()
    changed = re.findall(r"^ *(\S+): (.+ -> .+)$", text, flags=re.MULTILINE)
    assert changed == [
        ("optimizer.decay_norm_and_bias", "True -> False"),
        ("train.num_steps", "6 -> 7"),
    ]


def test_labels_of_an_eighth_need_logits_of_an_eighth(data, tmp_path):
    config = tiny(data, loss__resolution="eighth", model__family="lextal", data__crop_size=(32, 32))
    with pytest.raises(ValueError, match="progressive gives logits of image size"):
        compose(config, tmp_path)


def test_tiles_of_the_loss_are_those_of_each_device():
    config, label_set = default_config(), load_label_set("camvid")
    config.loss.update(aux_weight=0.4, presence_weight=0.0)
    mesh = parallel.make_mesh()
    assert mesh.size == 8
    assert compose_module._loss_options(config, label_set, mesh).tile_mib == 8 * 4
    config.loss.tile_mib = 3.0
    assert compose_module._loss_options(config, label_set, mesh).tile_mib == 8 * 3
