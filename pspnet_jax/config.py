"""Every option of a run on one page, in the order of the flow.

* A config file (`configs/*.py`) starts from `default_config()` and states only what differs.
* None means: take the value of the family, of the recipe or of the label set; config.json of a run
  holds what that was.
* `validate` checks ranges and lists every offender at once (types are ConfigDict's to hold). What only a module can know
  (does this family have that backbone, does this crop fit) that module checks when it is made.
"""

import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """All options with their defaults. Trailing comments give the unit and the constraint."""
    config = ConfigDict()
    config.name = placeholder(str)  # the run's folder is runs/<name>
    config.init_from = placeholder(str)  # weights at step 0: of a run, a converted model, a file
    config.seed = 0  # of initialization, order of images, augmentation, dropout; 0..2^32 - 1

    data = config.data = ConfigDict()
    data.source = "folder"  # folder | prepared | scenes
    # of a folder: ade20k | camvid | cityscapes | cityscapes_coarse | list | pairs | voc2012
    data.layout = "ade20k"
    data.root = placeholder(str)  # folder of images and masks, or what prepare wrote
    # ade20k | ade20k_train_ids | camvid | cityscapes | cityscapes_train_ids | scenes | voc2012, or a CSV
    # file id,name,red,green,blue,raw_ids
    data.labels = "ade20k"
    data.train_split = "training"  # name of a split in the layout; of list: its list file
    data.val_split = "validation"  # likewise
    data.crop_size = placeholder(tuple)  # (height, width), pixels, by the family's size rule
    data.num_workers = 0  # loader processes; 0 = threads of this one
    data.unreadable_share_max = 0.001  # of the training images; with more training stops; 0..1

    augment = config.augment = ConfigDict()
    augment.recipe = "semseg"  # semseg | mmseg | lextal | none; each has some of these:
    augment.scale_min = placeholder(float)  # factor, above 0
    augment.scale_max = placeholder(float)  # factor, at least scale_min
    augment.base_size = placeholder(tuple)  # (long, short) side at scale 1, pixels; mmseg
    augment.class_share_max = placeholder(float)  # of a crop's labeled pixels, 0..1; mmseg
    augment.color_probability = placeholder(float)  # of each change of color, 0..1; mmseg
    augment.area_min = placeholder(float)  # of the window, share of the image, 0..1; lextal
    augment.aspect_max = placeholder(float)  # of the window's sides, at least 1; lextal
    augment.rotation_degrees = placeholder(float)  # drawn from +- this; 0..180
    augment.rotation_probability = placeholder(float)  # 0..1
    augment.blur_probability = placeholder(float)  # 0..1
    augment.flip_probability = placeholder(float)  # 0..1

    model = config.model = ConfigDict()
    model.family = "semseg"  # semseg | caffe | mmseg | smp | csail | lextal
    # resnet10 | 18 | 34 | 50 | 101 | 152 | 269, densenet121, squeezenet
    model.backbone = "resnet50"
    model.width = 64  # planes of the first stage; all other channels scale with it
    model.stem = placeholder(str)  # deep (64, 64, 128 channels) | v1c (32, 32, 64) | 7x7
    model.num_stages = placeholder(int)  # of the backbone: 2 | 3 | 4, the last ones are left out
    model.output_stride = placeholder(int)  # image pixels per feature pixel: 8 | 16 | 32
    model.fixed_dilation = placeholder(bool)  # that of stride 8 at any stride
    model.first_block_dilation = placeholder(tuple)  # of stages 3 and 4
    model.bottleneck_stride = placeholder(str)  # which of its convolutions has it: 3x3 | 1x1
    # convolutions of a basic block that are dilated: both | first | stage (both, the second always by
    # the stage's own dilation)
    model.basic_block_dilation = placeholder(str)
    model.pyramid_bins = placeholder(tuple)  # bins per axis of each level; () = no pyramid
    model.pyramid_pool = placeholder(str)  # average | max
    model.pyramid_reduction = placeholder(bool)  # bring each level to 1/N of the channels
    model.pyramid_width = placeholder(int)  # to so many times the width instead; 0 = 1/N
    model.pyramid_linear = placeholder(bool)  # levels without norm and ReLU
    model.pyramid_bin1_norm = placeholder(bool)  # a norm, else a bias, in the level of one bin
    model.pyramid_map_first = placeholder(bool)  # map before the levels, or after them
    model.head = placeholder(str)  # fused | progressive
    model.head_width = placeholder(int)  # hidden channels, in times the width
    model.head_kernels = placeholder(tuple)  # sizes of the fused head's two kernels: 3,1
    model.aux_heads = placeholder(tuple)  # of pixel, presence; those with a loss are added
    model.aux_width = placeholder(int)  # hidden channels of auxiliary heads, in times the width
    model.align_corners = placeholder(bool)  # rule of every bilinear resize
    model.dropout_rate = placeholder(float)  # 0..1
    model.dropout_kind = placeholder(str)  # channel (whole ones) | element
    model.norm_momentum = placeholder(float)  # share of a batch in running statistics, 0..1
    model.initializer = placeholder(str)  # semseg | caffe | mmseg | smp | csail
    model.dtype = "float32"  # computed in: float32 | bfloat16 (float64 with JAX_ENABLE_X64=1)
    model.remat = False  # recompute blocks in the backward pass: less memory, more time
    model.frozen_norm = False  # batch norm keeps its running statistics

    loss = config.loss = ConfigDict()
    loss.aux_weight = placeholder(float)  # of the pixelwise auxiliary head; at least 0
    loss.presence_weight = placeholder(float)  # of the presence of classes in images; at least 0
    loss.class_weights = placeholder(tuple)  # one factor for each class; at least 0
    loss.label_smoothing = 0.0  # share of the target that is spread over all classes, 0..1
    loss.ohem_threshold = placeholder(float)  # only pixels of at most this probability count, 0..1
    loss.ohem_share_min = 0.0625  # of the valid pixels, that count in any case; 0..1
    loss.normalizer = "valid"  # divide by pixels: valid (that count) | all
    loss.resolution = "full"  # full: logits at label size | eighth: labels at that of the logits
    # of full-size logits that each device makes at a time, MiB; None = CPU 4, GPU 4096, TPU 64
    loss.tile_mib = placeholder(float)

    optimizer = config.optimizer = ConfigDict()
    optimizer.name = "sgd"  # sgd | adam
    optimizer.learning_rate = 0.01  # of the backbone at step 0; above 0
    optimizer.schedule = "poly"  # poly | multistep
    optimizer.warmup_steps = 0  # steps over which the learning rate rises linearly
    optimizer.power = 0.9  # of the poly schedule
    optimizer.minimum_learning_rate = 0.0  # where poly ends; at least 0
    optimizer.milestones = ()  # of multistep: steps after which the rate is multiplied, ascending
    optimizer.decay_factor = 0.1  # of multistep: by this
    optimizer.momentum = 0.9  # of SGD, 0..1
    optimizer.weight_decay = 1e-4  # on all parameters; at least 0
    optimizer.decay_norm_and_bias = True  # whether weight decay covers norms and biases
    optimizer.head_multiplier = 10.0  # learning rate of the heads over that of the backbone

    train = config.train = ConfigDict()
    train.global_batch_size = 16  # images per step over all devices
    train.recipe_batch_size = placeholder(int)  # that rate and steps are for: both are scaled
    train.accumulate_steps = 1  # parts of the batch that go through one after the other
    train.num_steps = 126_300  # optimizer steps
    train.log_every_steps = 50  # of progress lines and rows in metrics.jsonl
    train.evaluate_every_steps = 10_000  # and after the last step
    train.checkpoint_every_steps = 1_000  # and at each evaluation
    train.skipped_in_a_row_max = 100  # steps with a loss that is not finite, then it ends
    train.watchdog_minutes = 30.0  # without a step or an evaluated image, then it ends; 0 = never

    evaluate = config.evaluate = ConfigDict()
    evaluate.split = placeholder(str)  # None = data.val_split
    # whole | semseg | caffe | mmseg-whole | mmseg-slide | csail: see protocols.py. What is None is the
    # protocol's own; what a protocol does not have cannot be set.
    evaluate.protocol = "whole"
    evaluate.scales = placeholder(tuple)  # factors of base_size, e.g. (0.5, 1.0)
    evaluate.flip = placeholder(bool)  # average with the mirror image
    evaluate.absent_class = placeholder(str)  # in means: skip | zero
    evaluate.base_size = placeholder(int)  # long or short side at scale 1, pixels
    evaluate.max_size = placeholder(int)  # what the long side may not pass, pixels
    # (height, width) of windows, pixels; None = data.crop_size, mmseg's own
    evaluate.crop_size = placeholder(tuple)
    evaluate.stride = placeholder(tuple)  # between windows, down and across, pixels
    evaluate.batch_size = 1  # windows, or images of equal size, that go through together
    evaluate.canvas_gib = 2.0  # device memory for scores of unfinished images, beside the network's
    return config.lock()


_POSITIVE = (lambda x: x > 0, "above 0")
_AT_LEAST_0 = (lambda x: x >= 0, "at least 0")
_FRACTION = (lambda x: 0 <= x <= 1, "within 0..1")
_COUNT = (lambda x: x >= 1, "at least 1")
_PAIR = (
    lambda x: len(x) == 2 and all(isinstance(v, int) and v >= 1 for v in x),
    "two whole numbers of at least 1, e.g. 473,473",
)


def _one_of(*values: str) -> tuple[Callable[[str], bool], str]:
    return (lambda x: x in values, "one of " + ", ".join(values))


_CONSTRAINTS: dict[str, tuple[Callable, str]] = {
    "seed": (lambda x: 0 <= x < 2**32, "within 0..4294967295"),
    "data.source": _one_of("folder", "prepared", "scenes"),
    "data.layout": _one_of(
        "ade20k", "camvid", "cityscapes", "cityscapes_coarse", "list", "pairs", "voc2012"
    ),
    "data.crop_size": _PAIR,
    "data.num_workers": _AT_LEAST_0,
    "data.unreadable_share_max": _FRACTION,
    "augment.recipe": _one_of("semseg", "mmseg", "lextal", "none"),
    "augment.scale_min": _POSITIVE,
    "augment.scale_max": _POSITIVE,
    "augment.base_size": _PAIR,
    "augment.class_share_max": _FRACTION,
    "augment.color_probability": _FRACTION,
    "augment.area_min": (lambda x: 0 < x <= 1, "within 0..1, 0 excluded"),
    "augment.aspect_max": (lambda x: x >= 1, "at least 1"),
    "augment.rotation_degrees": (lambda x: 0 <= x <= 180, "within 0..180"),
    "augment.rotation_probability": _FRACTION,
    "augment.blur_probability": _FRACTION,
    "augment.flip_probability": _FRACTION,
    "model.width": _COUNT,
    "model.first_block_dilation": _PAIR,
    "model.pyramid_bins": (
        lambda x: all(isinstance(v, int) and v >= 1 for v in x),
        "whole numbers of at least 1",
    ),
    "model.num_stages": (lambda x: x in (2, 3, 4), "2, 3 or 4"),
    "model.pyramid_width": _AT_LEAST_0,
    "model.head_width": _COUNT,
    "model.head_kernels": _PAIR,
    "model.aux_width": _COUNT,
    "model.norm_momentum": _FRACTION,
    "model.dropout_rate": (lambda x: 0 <= x < 1, "within 0..1, 1 excluded"),
    "loss.aux_weight": _AT_LEAST_0,
    "loss.presence_weight": _AT_LEAST_0,
    "loss.class_weights": (
        lambda x: all(v >= 0 for v in x) and any(v > 0 for v in x),
        "factors of at least 0, not all 0",
    ),
    "loss.label_smoothing": (lambda x: 0 <= x < 1, "within 0..1, 1 excluded"),
    "loss.ohem_threshold": (lambda x: 0 < x < 1, "within 0..1, both excluded"),
    "loss.ohem_share_min": _FRACTION,
    "loss.normalizer": _one_of("valid", "all"),
    "loss.resolution": _one_of("full", "eighth"),
    "loss.tile_mib": _POSITIVE,
    "optimizer.name": _one_of("sgd", "adam"),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.schedule": _one_of("poly", "multistep"),
    "optimizer.milestones": (
        lambda x: list(x) == sorted(set(x)) and all(isinstance(v, int) and v >= 1 for v in x),
        "ascending whole numbers of at least 1",
    ),
    "optimizer.decay_factor": _POSITIVE,
    "optimizer.warmup_steps": _AT_LEAST_0,
    "optimizer.power": _AT_LEAST_0,
    "optimizer.minimum_learning_rate": _AT_LEAST_0,
    "optimizer.momentum": (lambda x: 0 <= x < 1, "within 0..1, 1 excluded"),
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.head_multiplier": _POSITIVE,
    "train.global_batch_size": _COUNT,
    "train.recipe_batch_size": _COUNT,
    "train.accumulate_steps": _COUNT,
    "train.num_steps": _COUNT,
    "train.log_every_steps": _COUNT,
    "train.evaluate_every_steps": _COUNT,
    "train.checkpoint_every_steps": _COUNT,
    "train.skipped_in_a_row_max": _COUNT,
    "train.watchdog_minutes": _AT_LEAST_0,
    "evaluate.protocol": _one_of("whole", "semseg", "caffe", "mmseg-whole", "mmseg-slide", "csail"),
    "evaluate.scales": (
        lambda x: len(x) > 0 and all(0 < v <= 100 for v in x),
        "factors above 0, at most 100, e.g. '(0.5,1.0)'",
    ),
    "evaluate.absent_class": _one_of("skip", "zero"),
    "evaluate.base_size": _COUNT,
    "evaluate.max_size": _COUNT,
    "evaluate.crop_size": _PAIR,
    "evaluate.stride": _PAIR,
    "evaluate.batch_size": _COUNT,
    "evaluate.canvas_gib": _POSITIVE,
}


def validate(config: ConfigDict) -> None:
    """Check every value that is set against its constraint.

    Raises:
        ValueError: listing all offenders, each with its value and what is possible.
    """
    faults = []
    for name, (is_valid, requirement) in _CONSTRAINTS.items():
        value = _get(config, name)
        if value is not None and not _is_valid(value, is_valid):
            faults.append(f"{name}={value!r} must be {requirement}")
    augment = config.augment
    if augment.scale_min and augment.scale_max and augment.scale_min > augment.scale_max:
        faults.append("augment.scale_min must not be above augment.scale_max")
    optimizer = config.optimizer
    if optimizer.minimum_learning_rate > optimizer.learning_rate:
        faults.append("optimizer.minimum_learning_rate must not be above optimizer.learning_rate")
    if optimizer.minimum_learning_rate and optimizer.schedule != "poly":
        faults.append(
            f"optimizer.minimum_learning_rate does nothing with schedule={optimizer.schedule}"
        )
    if config.name is None or not re.fullmatch(r"\w[\w.-]*", config.name):
        faults.append(f"name={config.name!r} must be the name of a folder")
    if faults:
        raise ValueError("the config has faults:\n  " + "\n  ".join(faults))


def _is_valid(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    try:
        return is_valid(value)
    except TypeError:  # a word in a tuple of numbers
        return False


def scale_to_batch(config: ConfigDict) -> str | None:
    """Bring learning rate and steps from `train.recipe_batch_size` to the batch at hand, in place.

    The linear rule (Goyal et al. 2017): the rate in proportion to the batch, as many images in all.

    Returns:
        What was changed, in words; None where nothing was.
    """
    recipe, batch = config.train.recipe_batch_size, config.train.global_batch_size
    if recipe is None or recipe == batch:
        return None
    said = []
    for section, name, factor in (
        ("optimizer", "learning_rate", batch / recipe),
        ("optimizer", "minimum_learning_rate", batch / recipe),
        ("optimizer", "warmup_steps", recipe / batch),
        ("optimizer", "milestones", recipe / batch),
        ("train", "num_steps", recipe / batch),
        ("train", "evaluate_every_steps", recipe / batch),
        ("train", "checkpoint_every_steps", recipe / batch),
    ):
        old = config[section][name]
        if isinstance(old, float):
            new = old * factor
        elif isinstance(old, tuple):
            new = tuple(sorted({max(round(step * factor), 1) for step in old}))
        else:
            new = max(round(old * factor), 1) if old else 0
        if new != old:
            config[section][name] = new
            said.append(f"{section}.{name}: {old} -> {new}")
    config.train.recipe_batch_size = batch
    listed = "\n  ".join(said)
    return f"from a batch of {recipe} to one of {batch} images:\n  {listed}"


def load(path: Path | str) -> ConfigDict:
    """What a config file's `get_config()` returns; the file is executed.

    Raises:
        FileNotFoundError, ValueError: where there is no such file, or it is none of Python.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file, as config files are")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def option_names() -> list[str]:
    """Dotted names of all options, e.g. 'train.num_steps'."""
    names = []
    for section, value in default_config().to_dict().items():
        names += [f"{section}.{key}" for key in value] if isinstance(value, dict) else [section]
    return names


def option_lines() -> list[str]:
    """Every option with its default and what stands beside it, or above it, in `default_config`; in its order."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(default_config).splitlines():
        code, _, comment = line.strip().partition("# ")
        name = code.partition(" = ")[0].removeprefix("config.")
        comments[name] = comment or " ".join(above)
        above = [*above, comment] if comment and not code else []
    config = default_config()
    values = {name: f"{name} = {_get(config, name)}" for name in option_names()}
    width = max(map(len, values.values()))
    return [
        f"{values[name]:<{width}}  {comment}".rstrip()
        for name, comment in comments.items()
        if name in values
    ]


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; ValueError for options that this version does not know."""
    config = default_config()
    stored = json.loads(text)
    flat = [f"{s}.{k}" for s, v in stored.items() if isinstance(v, dict) for k in v]
    unknown = set(flat + [s for s, v in stored.items() if not isinstance(v, dict)]) - set(
        option_names()
    )
    if unknown:
        raise ValueError(
            f"config.json has options of another version: {', '.join(sorted(unknown))}"
        )
    for section, values in stored.items():
        if not isinstance(values, dict):
            config[section] = values
            continue
        for key, value in values.items():
            config[section][key] = tuple(value) if isinstance(value, list) else value
    return config


def _get(config: ConfigDict, name: str) -> object:
    for key in name.split("."):
        config = config[key]
    return config
