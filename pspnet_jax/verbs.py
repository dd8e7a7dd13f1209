"""The verbs of the command line: what each does, its flags, and the call that it makes of them.

* A verb is a row of `VERBS`. Its flags are defined and read here, side by side; what it does lies in the module
  of its name, which is imported when it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_dict import placeholder

from pspnet_jax.command_words import lacks_config, word_of
from pspnet_jax.config import from_json, option_lines

# Of a config, where a verb does not use all of it. `check` takes any option, so that the command of a
# training can be checked as it stands.
USED_OPTIONS = {
    "evaluate": (
        "--config.data.",
        "--config.evaluate.split",
        "--config.evaluate.batch_size",
        "--config.evaluate.canvas_gib",
    ),
    "prepare": ("--config.data.", "--config.evaluate.split"),
}
MISSING_CONFIG = "--config=FILE is missing, e.g. --config=configs/scenes.py"


def _define_train(values: flags.FlagValues, argv: list[str]) -> None:
    _define_config(values, argv)
    flags.DEFINE_string(
        "workdir", None, "Folder of the run (default: runs/<name>).", flag_values=values
    )
    _define_distributed(values)


def _run_train(values: flags.FlagValues, words: list[str]) -> None:
    from pspnet_jax.report import FILES
    from pspnet_jax.train import train

    config = _required_config(values)
    folder = train(config, Path(value(values, "workdir") or Path("runs") / str(config.name)))
    for what in ("tables", "picture"):  # the log named the report
        print(f"{what}: {folder / FILES[what]}")


def _define_evaluate(values: flags.FlagValues, argv: list[str]) -> None:
    _define_checkpoint(values)
    _define_config_or_runs_own(values, argv)
    flags.DEFINE_string(
        "split", None, "Split of the data (default: the config's).", flag_values=values
    )
    _define_protocol(values)
    flags.DEFINE_string("absent_class", None, "In means: skip or zero.", flag_values=values)
    _define_passes(values)
    _define_output(values, "Folder of the report (default: in the run).")
    _define_distributed(values)


def _run_evaluate(values: flags.FlagValues, words: list[str]) -> None:
    from pspnet_jax import evaluate

    evaluate.run(
        _required(values, "checkpoint"),
        config=_config(values),
        step=value(values, "step"),
        split=value(values, "split"),
        protocol=value(values, "protocol"),
        protocol_options=_protocol_options(values),
        passes=_passes(values),
        dtype=value(values, "dtype"),
        output=value(values, "output"),
    )


def _define_predict(values: flags.FlagValues, argv: list[str]) -> None:
    _define_checkpoint(values)
    _define_output(values, "Folder of the results.")
    flags.DEFINE_list(
        "outputs",
        ["class_maps", "palette", "overlays", "legend"],
        "What is written (default: class_maps,palette,overlays,legend).",
        flag_values=values,
    )
    for name, meaning in {
        "confidence": "Also gray pictures: probability of the class.",
        "entropy": "Also gray pictures: entropy of the probabilities, 0 .. 1.",
        "probabilities": "Also float16 [height, width, classes] as .npy files.",
        "overwrite": "Replace results that exist.",
        "resume": "Leave out images whose results all exist.",
    }.items():
        flags.DEFINE_boolean(name, False, meaning, flag_values=values)
    flags.DEFINE_string(
        "submission",
        None,
        "Also files for the server of a benchmark: cityscapes or ade20k.",
        flag_values=values,
    )
    _define_protocol(values)
    _define_passes(values)


def _run_predict(values: flags.FlagValues, words: list[str]) -> None:
    from pspnet_jax import predict

    more = ("confidence", "entropy", "probabilities")
    predict.run(
        _required(values, "checkpoint"),
        words,
        output=_required(values, "output"),
        outputs=[*value(values, "outputs"), *filter(lambda name: value(values, name), more)],
        submission=value(values, "submission"),
        protocol=value(values, "protocol"),
        protocol_options=_protocol_options(values),
        **_passes(values),
        overwrite=value(values, "overwrite"),
        resume=value(values, "resume"),
        step=value(values, "step"),
        dtype=value(values, "dtype"),
    )


def _define_check(values: flags.FlagValues, argv: list[str]) -> None:
    _define_config(values, argv)
    _define_output(values, "JSON file for what was found, e.g. check.json.")


def _run_check(values: flags.FlagValues, words: list[str]) -> None:
    from pspnet_jax import check, check_report

    config = _required_config(values)
    found = check.run(config, output=value(values, "output"))
    print(check_report.text(found))
    if found.problems:
        raise ValueError("these data would stop or spoil a training; the problems are listed above")


def _define_prepare(values: flags.FlagValues, argv: list[str]) -> None:
    _define_config(values, argv)
    _define_output(values, "Folder that becomes data.root of data.source=prepared.")


def _run_prepare(values: flags.FlagValues, words: list[str]) -> None:
    from pspnet_jax import prepare

    output, config = _required(values, "output"), _required_config(values)
    print(f"prepared: {prepare.run(config, output=output)}")


def _define_convert(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string(
        "family",
        "semseg",
        "Whose file it is: semseg, caffe, mmseg, smp, csail or lextal.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "labels",
        None,
        "Label set of its classes, e.g. ade20k (default: none, it is a backbone).",
        flag_values=values,
    )
    not_told = "; the file does not tell (default: the family's)."
    flags.DEFINE_list(
        "pyramid_bins",
        None,
        f"Bins per axis of the pyramid's levels, in their order{not_told}",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "align_corners", None, f"Rule of bilinear resizes{not_told}", flag_values=values
    )
    flags.DEFINE_integer(
        "output_stride",
        None,
        f"Image pixels per feature pixel{not_told}",
        flag_values=values,
    )
    _define_output(values, "Folder of the result.")


def _run_convert(values: flags.FlagValues, words: list[str]) -> None:
    from pspnet_jax import convert

    convert.run(
        words,
        output=_required(values, "output"),
        family=value(values, "family"),
        labels=value(values, "labels"),
        pyramid_bins=_numbers(values, "pyramid_bins", int),
        align_corners=value(values, "align_corners"),
        output_stride=value(values, "output_stride"),
    )


def _define_export(values: flags.FlagValues, argv: list[str]) -> None:
    _define_checkpoint(values)
    flags.DEFINE_string(
        "format",
        None,
        "pspnet_jax: the network in one file, for predict and evaluate; safetensors: weights under their published names; caffemodel: those of the family caffe; "
        "stablehlo: a function for jax.export.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "platforms", None, "Of stablehlo (default: cpu,cuda,tpu).", flag_values=values
    )
    _define_output(values, "The file.")


def _run_export(values: flags.FlagValues, words: list[str]) -> None:
    from pspnet_jax import export

    platforms = value(values, "platforms")
    export.run(
        _required(values, "checkpoint"),
        format=_required(values, "format"),
        output=_required(values, "output"),
        step=value(values, "step"),
        platforms=None if platforms is None else tuple(platforms),
    )


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, how it is called, its flags, its function."""

    purpose: str
    usage: str
    define: Callable[[flags.FlagValues, list[str]], None]
    run: Callable[[flags.FlagValues, list[str]], None]
    examples: tuple[str, ...]
    """Whole commands."""
    takes_words: bool = False
    after_interrupt: str = "the same command starts anew"


VERBS = {
    "train": Verb(
        "train a network, then evaluate it; the same command resumes",
        "pspnet --config=configs/scenes.py [--workdir=DIR] [--config.train.num_steps=1000]",
        _define_train,
        _run_train,
        (
            "pspnet --config=configs/scenes.py",
            "pspnet --config=configs/ade20k.py --config.data.root=ADEChallengeData2016 --config.init_from=resnet50_v2.pth",
            "pspnet --config=configs/folder_resnet50.py --config.data.root=DIR --config.data.labels=mine.csv --config.init_from=runs/psp50",
        ),
        after_interrupt="the same command goes on from what is saved",
    ),
    "evaluate": Verb(
        "score a checkpoint on a split, with a report and pictures",
        "pspnet evaluate --checkpoint=runs/scenes [--step=best|latest|N] [--protocol=semseg] [--scales=0.5,1]",
        _define_evaluate,
        _run_evaluate,
        (
            "pspnet evaluate --checkpoint=scenes",
            "pspnet evaluate --checkpoint=runs/ade20k --step=latest --protocol=semseg --scales=0.5,0.75,1,1.25,1.5,1.75",
            "pspnet evaluate --checkpoint=runs/psp50 --config=configs/ade20k.py --config.data.root=ADEChallengeData2016",
        ),
    ),
    "predict": Verb(
        "class maps, palette pictures and overlays of images",
        "pspnet predict --checkpoint=runs/scenes --output=DIR [--resume] [--confidence] [--protocol=semseg] IMAGE, FOLDER or 'PATTERN'...",
        _define_predict,
        _run_predict,
        (
            "pspnet predict --checkpoint=scenes --output=predicted photo.jpg",
            "pspnet predict --checkpoint=runs/psp50 --output=predicted --resume FOLDER 'more/**/*.png'",
            "pspnet predict --checkpoint=runs/city --output=predicted --outputs= --submission=cityscapes leftImg8bit/test",
        ),
        takes_words=True,
        after_interrupt="the same command with --resume does the images that are left",
    ),
    "check": Verb(
        "read all images and masks of a config's data and report what is wrong",
        "pspnet check --config=FILE [--config.data.root=DIR] [--output=check.json]",
        _define_check,
        _run_check,
        (
            "pspnet check --config=configs/camvid_resnet18.py --config.data.root=CamVid",
            "pspnet check --config=configs/folder_resnet50.py --config.data.root=DIR --config.data.labels=mine.csv --output=check.json",
        ),
    ),
    "prepare": Verb(
        "a folder of images and masks as a few large files, for data.source=prepared",
        "pspnet prepare --config=FILE --config.data.root=FOLDER --output=DIR",
        _define_prepare,
        _run_prepare,
        (
            "pspnet prepare --config=configs/ade20k.py --config.data.root=ADEChallengeData2016 --output=prepared",
            "pspnet --config=configs/ade20k.py --config.data.source=prepared --config.data.root=prepared",
        ),
    ),
    "convert": Verb(
        "published weights into a model to evaluate, predict with or start from",
        "pspnet convert [--family=semseg] --labels=ade20k --output=DIR WEIGHTS... (no --labels: a backbone)",
        _define_convert,
        _run_convert,
        (
            "pspnet convert --labels=ade20k --output=runs/psp50 train_epoch_100.pth",
            "pspnet convert --output=runs/resnet50 resnet50_v2.pth",
            "pspnet convert --family=mmseg --labels=ade20k --output=runs/mmseg50 pspnet_r50-d8_512x512_160k_ade20k.pth",
        ),
        takes_words=True,
    ),
    "export": Verb(
        "a model as a file for other programs: weights with published names, or a function",
        "pspnet export --checkpoint=DIR --format=pspnet_jax|safetensors|caffemodel|stablehlo --output=FILE",
        _define_export,
        _run_export,
        (
            "pspnet export --checkpoint=runs/scenes --format=pspnet_jax --output=mine.safetensors",
            "pspnet export --checkpoint=runs/ade20k --format=safetensors --output=psp50.safetensors",
            "pspnet export --checkpoint=scenes --format=stablehlo --output=scenes.stablehlo --platforms=cpu",
        ),
    ),
}


def overview() -> str:
    """What `pspnet --help` prints."""
    lines = ["pspnet: scene parsing with PSPNet in JAX", ""]
    for name, verb in VERBS.items():
        lines += [f"  {name:<10}{verb.purpose}", f"            {verb.usage}"]
    return "\n".join([*lines, "", "pspnet VERB --help lists the flags of a verb."])


def verb_help(name: str) -> str:
    """What `pspnet VERB --help` prints."""
    values = flags.FlagValues()
    verb = VERBS[name]
    verb.define(values, ["pspnet"])
    lines = [f"pspnet {name}: {verb.purpose}", "", f"usage: {verb.usage}", "", "examples:"]
    lines += [*(f"  {example}" for example in verb.examples), "", "flags:"]
    for flag_name in sorted(values):
        if flag_name in ("help", "helpshort", "helpfull", "helpxml", "flagfile", "undefok"):
            continue
        lines.append(f"  --{flag_name:<14}{values[flag_name].help}")
    if name == "check":
        taken = "--config.data.* and --config.evaluate.split"
        lines += ["", f"options of the config: those of a training, of which it looks at {taken}"]
    elif name in USED_OPTIONS:
        used = ", ".join(f"{x}*" if x.endswith(".") else x for x in USED_OPTIONS[name])
        lines += ["", f"options of the config: {used}"]
    elif "config" in values:
        lines += [
            "",
            "options (--config.NAME=VALUE) with their defaults (None: the family's, the recipe's or the label set's):",
        ]
        lines += [f"  {line}" for line in option_lines()]
    return "\n".join(lines)


def _define_config(values: flags.FlagValues, argv: list[str]) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/scenes.py.", flag_values=values, sys_argv=argv
    )


def _define_config_or_runs_own(values: flags.FlagValues, argv: list[str]) -> None:
    """Without --config its options change the config of the checkpoint's run, but for how masks are read, which the
    checkpoint itself says."""
    checkpoint = word_of(argv, "checkpoint")
    path = Path(checkpoint or "") / "config.json"
    if not lacks_config(argv) or not checkpoint or not path.is_file():
        _define_config(values, argv)
        return
    try:
        config = from_json(path.read_text())
    except ValueError as error:
        raise flags.Error(f"{path}: {error}") from None
    with config.ignore_type():
        config.data.labels = placeholder(str)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)


def _define_distributed(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "Join other processes: auto (where the environment names several), on or off.",
        flag_values=values,
    )


def _define_checkpoint(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run, a file of export --format=pspnet_jax, or scenes (shipped).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "step", "best", "best (default), latest, or a step number.", flag_values=values
    )


def _define_output(values: flags.FlagValues, meaning: str) -> None:
    flags.DEFINE_string("output", None, meaning, flag_values=values)


def _define_protocol(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "protocol",
        None,
        "whole, semseg, caffe, mmseg-whole, mmseg-slide or csail (default: the checkpoint's).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "scales", None, "Factors of base_size, e.g. 0.5,0.75,1,1.25,1.5,1.75.", flag_values=values
    )
    flags.DEFINE_boolean(
        "flip", None, "Average with the mirror image; --noflip: do not.", flag_values=values
    )
    flags.DEFINE_integer(
        "base_size",
        None,
        "Long (mmseg, csail: short) side at scale 1, pixels (default: label set's).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_size", None, "Limit of the long side, pixels (mmseg, csail).", flag_values=values
    )
    flags.DEFINE_list("crop_size", None, "Of windows: 473 or 473,713 pixels.", flag_values=values)
    flags.DEFINE_list(
        "stride", None, "Between windows, pixels (default: crop_size * 2/3).", flag_values=values
    )


def _define_passes(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Windows, or images of equal size, in one pass (default: the config's, else 1).",
        flag_values=values,
    )
    flags.DEFINE_float(
        "canvas_gib",
        None,
        "Memory for scores of unfinished images, GiB (default: the config's, else 2).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "dtype",
        None,
        "Computed in: float32 or bfloat16 (default: what the checkpoint was trained in).",
        flag_values=values,
    )


def _passes(values: flags.FlagValues) -> dict[str, Any]:
    """What of the size of passes the flags change."""
    options = {name: value(values, name) for name in ("batch_size", "canvas_gib")}
    return {name: value for name, value in options.items() if value is not None}


def _protocol_options(values: flags.FlagValues) -> dict[str, Any]:
    """What of a protocol the flags change."""
    options = {
        "scales": _numbers(values, "scales", float),
        "flip": value(values, "flip"),
        "base_size": value(values, "base_size"),
        "absent_class": value(values, "absent_class") if "absent_class" in values else None,
        "max_size": value(values, "max_size"),
        "crop_size": _pair(values, "crop_size"),
        "stride": _pair(values, "stride"),
    }
    return {name: value for name, value in options.items() if value is not None}


def value(values: flags.FlagValues, name: str) -> Any:
    """Of a flag."""
    return values[name].value


def _config(values: flags.FlagValues) -> Any:
    """What --config and its options give, or None."""
    config = value(values, "config")
    if config is not None and config.data.root is not None:  # as a config file may write it
        config.data.root = str(Path(config.data.root).expanduser())
    return config


def _required_config(values: flags.FlagValues) -> Any:
    config = _config(values)
    if config is None:
        raise flags.ValidationError(MISSING_CONFIG)
    return config


def _numbers(values: flags.FlagValues, name: str, kind: type) -> tuple | None:
    words = value(values, name)
    try:
        return None if words is None else tuple(map(kind, words))
    except ValueError:
        raise flags.ValidationError(f"--{name}={','.join(words)} must be numbers") from None


def _pair(values: flags.FlagValues, name: str) -> tuple[int, int] | None:
    """Height and width; one number stands for both."""
    numbers = _numbers(values, name, int)
    return numbers * 2 if numbers is not None and len(numbers) == 1 else numbers


def _required(values: flags.FlagValues, name: str) -> Any:
    given = value(values, name)
    if given is None or given == "":
        raise flags.ValidationError(f"--{name}=... is missing")
    return given
