"""The words of a command line, before absl reads them.

ConfigDict's flags are read from the same words as all others, so whatever has to be known of them first (is there
a config, which checkpoint, what is given twice) is looked up here.
"""

import os
import re

OPTION = re.compile(r"--?(?:no)?config\.([\w.]+)")
"""Of a config, as absl takes it: with one dash or two, the value behind '=' or in the next word."""


def options_of(argv: list[str]) -> list[str]:
    """Names of the options of a config, e.g. 'train.num_steps', in their order."""
    return [match[1] for match in map(OPTION.match, argv) if match]


def lacks_config(argv: list[str]) -> bool:
    """Whether options of a config are given and no --config."""
    return bool(options_of(argv)) and word_of(argv, "config") is None


def word_of(argv: list[str], flag: str) -> str | None:
    """What stands behind a flag, as one word or two; the last one where it is given twice, as absl takes it."""
    for i in reversed(range(len(argv))):
        name, equals, text = argv[i].partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return text if equals else next(iter(argv[i + 1 : i + 2]), None)
    return None


def expanded(word: str) -> str:
    """--workdir=~/runs: shells leave a ~ behind = as it is."""
    name, equals, value = word.partition("=")
    is_path = name.startswith("-") and value.startswith("~")
    return f"{name}={os.path.expanduser(value)}" if equals and is_path else word


def last_of_each(argv: list[str]) -> list[str]:
    """Without options of the config that are given again further on: of tuples ConfigDict would join all."""
    seen: set[str] = set()
    kept: list[str] = []
    for i in reversed(range(len(argv))):
        match = OPTION.match(argv[i])
        if match and match[1] in seen:
            if "=" not in argv[i] and i + 1 < len(argv) and not argv[i + 1].startswith("-"):
                kept.pop()  # its value, the next word
            continue
        if match:
            seen.add(match[1])
        kept.append(argv[i])
    return kept[::-1]
