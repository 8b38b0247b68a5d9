"""The one error a user can cause, and the two helpers that word it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, where, what to do.

    The command line prints it after `slm-assist: error:` and exits with status 2, without a traceback.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the choice nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, sorted(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises `UserError` unless `value` is among `choices`; `key` says where the value stands."""
    choices = sorted(choices)
    if value not in choices:
        raise UserError(f"{key}={value!r}: choose one of {', '.join(choices)}{nearest(value, choices)}")
