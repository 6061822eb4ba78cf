"""The parser of command lines: argparse's, and it asks whether another option or command is meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from labkit.suggest import did_you_mean


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors name the option or choice that is nearest to a misspelt one."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse, and end the program with an error if there are options that this command does not have."""
        found, rest = super().parse_known_args(args, namespace)
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
