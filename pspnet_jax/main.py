"""The command line: `python -m pspnet_jax.main [VERB] ...`, or `pspnet [VERB] ...`; no verb means train.

* Each verb has its own flags (`verbs`), so `VERB --help` is short and a foreign flag or a leftover word is an
  error.
* Nothing heavy is imported before the flags are read.
* Exit codes: 0 done, 1 a fault in the data, the config, the checkpoint or the machine, 2 a fault in the
  command, 75 the watchdog ended it, 130 interrupted (Ctrl-C), 143 told to end (SIGTERM).
"""

import difflib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags

from pspnet_jax.command_words import expanded, lacks_config, last_of_each, options_of, word_of
from pspnet_jax.config import option_names
from pspnet_jax.verbs import MISSING_CONFIG, USED_OPTIONS, VERBS, Verb, overview, value, verb_help
from pspnet_jax.version import __version__

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_TERMINATED = 128 + signal.SIGTERM
_PEER_LOST = 128 + signal.SIGABRT  # as where JAX notices it, and aborts
_LESS_MEMORY = {
    True: "a smaller --config.train.global_batch_size (with more --config.train.accumulate_steps) takes less",
    False: "a smaller --batch_size or --canvas_gib takes less, or a protocol with windows",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--help"], ["-h"], ["help"]):
        print(overview())
        return 0
    if argv[:1] == ["--version"]:
        print(f"pspnet_jax {__version__}")
        return 0
    named = bool(argv) and not argv[0].startswith("-")
    name, rest = (argv[0], argv[1:]) if named else ("train", argv)
    rest = last_of_each([*map(expanded, rest)])
    if name not in VERBS:
        return _fail(2, f"unknown verb '{name}'{_nearest(name, list(VERBS))}\n\n{overview()}")
    verb = VERBS[name]
    if "--help" in rest:
        print(verb_help(name))
        return 0
    file = word_of(rest, "config")
    if file is not None and not Path(file).is_file():
        return _fail(2, f"--config={file}: there is no such file")
    values = flags.FlagValues()
    try:
        verb.define(values, ["pspnet", *rest])
        words = values(["pspnet", *rest])[1:]
        if words and not verb.takes_words:
            raise flags.Error(
                f"leftover words: {' '.join(words)} (values are given as --option=value)"
            )
        _refuse_unused_options(name, rest)
    except (flags.Error, AttributeError, KeyError, TypeError, SyntaxError, ImportError) as error:
        return _fail(2, f"{_explain(error, rest)}\n\nusage: {verb.usage}")
    return _run(verb, values, words)


def _refuse_unused_options(verb: str, argv: list[str]) -> None:
    """Some verbs take only the data from a config; the rest of it must not be changed in vain."""
    if verb not in USED_OPTIONS:
        return
    used = USED_OPTIONS[verb]
    named = [f"--config.{name}" for name in options_of(argv)]
    unused = [name for name in named if not name.startswith(used)]
    if not unused:
        return
    takes = ", ".join(
        option.removeprefix("--config.").replace("data.", "data.*") for option in used
    )
    own = "; the protocol has flags of its own (--protocol, --scales, --noflip, ...)"
    raise flags.Error(
        f"{verb} does not use {', '.join(unused)}: of a config it takes {takes}"
        + (own if verb == "evaluate" else "")
    )


def _run(verb: Verb, values: flags.FlagValues, words: list[str]) -> int:
    from pspnet_jax import processes, programs
    from pspnet_jax.progress import log, log_to

    log_to(None)
    programs.keep()
    try:
        if "distributed" in values:
            processes.meet(value(values, "distributed"))
        verb.run(values, words)
        log.debug("exit code 0: done")
        return 0
    except BaseException as error:
        # The place in the code is for log.txt; whoever typed the command needs the sentence.
        log.debug("stopped by", exc_info=True)
        code, message = _reason(error, verb)
        if code is None:
            log.debug("exit code 1, by a fault of this program")
            raise
        log.debug("exit code %d: %s", code, message)
        return _fail(code, message)


def _reason(error: BaseException, verb: Verb) -> tuple[int | None, str]:
    """Exit code and message of what ended a verb; (None, '') for a fault of ours, whose traceback helps."""
    from pspnet_jax.checkpoint import CorruptCheckpointError
    from pspnet_jax.termination import Terminated

    match error:
        case flags.ValidationError():
            return 2, f"{error}\n\nusage: {verb.usage}"
        case OSError() if error.errno in _DISK_ERRORS:
            return 1, f"{error}; {verb.after_interrupt}"
        case ValueError() | OSError() | CorruptCheckpointError():
            return 1, str(error)
        case Exception() if _is_of_memory(error):
            return 1, f"out of memory: {_LESS_MEMORY[verb is VERBS['train']]}\n{error}"
        case RuntimeError() if _is_of_several():
            message = f"another process ended or cannot be reached, see its log: {error}"
            return _PEER_LOST, f"{message}; {verb.after_interrupt}"
        case KeyboardInterrupt():
            return 130, f"interrupted; {str(error) or verb.after_interrupt}"
        case Terminated():
            message = f"told to end by SIGTERM {error}".rstrip()
            return _TERMINATED, f"{message}; {verb.after_interrupt}"
    return None, ""


def _is_of_memory(error: Exception) -> bool:
    """Of the device, of Python, or of OpenCV."""
    signs = ("RESOURCE_EXHAUSTED", "Insufficient memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _is_of_several() -> bool:
    """Whether this process works together with others."""
    from jax import distributed

    return distributed.is_initialized()


def _explain(error: Exception, argv: list[str]) -> str:
    # ConfigDict raises an AttributeError around a KeyError, whose text is a quotation of the sentence.
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    if "has no attribute 'get_config'" in str(error):
        return f"{word_of(argv, 'config')} has no function get_config(), as configs/scenes.py has"
    text = str(inner.args[0]) if isinstance(inner, KeyError) and inner.args else str(inner)
    for name in options_of(argv):
        if name not in option_names():
            return f"unknown option --config.{name}{_nearest(name, option_names())}"
    is_missing = lacks_config(argv) and isinstance(error, flags.UnrecognizedFlagError)
    return MISSING_CONFIG if is_missing else text


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def _fail(code: int, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def command() -> NoReturn:
    """The console script. An end that nobody waits for: threads of a save that failed wait for each other, and
    other processes in a collective for this one."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on
        os._exit(1)
    except Exception:
        traceback.print_exc()
        code = 1
    if code == 0:
        sys.exit(0)
    if code == _TERMINATED:  # of several processes all end
        from jax import distributed

        if distributed.is_initialized():
            distributed.shutdown()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
