"""What the subcommands' parsers share."""

import argparse
from collections.abc import Callable
from typing import Any

from slm_assist.errors import UserError

# Adds a subcommand: `command(name, run, help_text, examples, note)`; see `cli.py`.
Command = Callable[..., argparse.ArgumentParser]


def number(kind: type) -> Callable[[str], Any]:
    """A parser of numbers of a kind, for argparse."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            cure = "a whole one" if kind is int else "one such as 0.2"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number; give {cure}") from None

    return parse


def refuse(overrides: dict[str, str], command: str) -> None:
    """Raises `UserError` where a command that takes no keys of the config was given one."""
    if overrides:
        raise UserError(f"--{next(iter(overrides))} is not an option of {command}; see slm-assist {command} --help")
