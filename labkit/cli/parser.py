"""The parser of command lines: argparse's, and it asks whether another option or command is meant."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from labkit.suggest import did_you_mean

OTHER_NAMES = {"clip_grad_norm": "clip"}  # of arguments, with the options that give them
TRAINING_OPTIONS = "--lr, --optimizer and --clip"
_KEY = re.compile(r"-[\w-]{42}")  # a public key, of which one in 64 begins like an option


def in_options(text: str, names: Iterable[str]) -> str:
    """What an error says of arguments of functions, in the words of a command line: `lr=-1:` as `--lr -1:`.

    Args:
        text: The error.
        names: The options of the command, as attributes: `data_dir` for `--data-dir`.
    """
    options = {name: name for name in names} | OTHER_NAMES
    argument = rf"(?<!--option )(?<!--option ')(?<![\w.?&/-])({'|'.join(sorted(options, key=len, reverse=True))})="
    value = r"('[^'\n]*'|[\[(][-\d., ]*[\])]|…|[^\s:;,)]+)"

    def write(found: re.Match[str]) -> str:
        name, given = options[found[1]].replace("_", "-"), found[2]
        if given.startswith("'"):
            given = shlex.quote(given[1:-1])
        elif given[0] in "[(":
            given = " ".join(re.findall(r"[-\d.]+", given))
        return f"--{name} {given}"

    return re.sub(argument + value, write, text.replace("backend=BackendConfig(…)", TRAINING_OPTIONS))


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors name the option or choice that is nearest to a misspelt one."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse, and end the program with an error if there are options that this command does not have."""
        found, rest = super().parse_known_args(_with_keys(sys.argv[1:] if args is None else args), namespace)
        unknown = next((text.partition("=")[0] for text in rest if text.startswith("-")), None)
        if unknown is not None:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(rest)}{did_you_mean(unknown, options)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, perhaps with what is meant, and end the program."""
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += did_you_mean(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        super().error(message)


def _with_keys(arguments: Sequence[str]) -> list[str]:
    """The arguments, with each key that begins with a dash put behind its option, as `--member=KEY`."""
    joined: list[str] = []
    for argument in arguments:
        if joined and re.fullmatch(r"--[a-z-]+", joined[-1]) and _KEY.fullmatch(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
