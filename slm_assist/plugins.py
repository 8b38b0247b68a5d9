"""Functions from other people's packages, named in a config as "package.module:function"."""

import importlib
from collections.abc import Callable
from typing import Any

from slm_assist.errors import UserError, nearest


def is_plugin(name: str) -> bool:
    """Whether a config's value names a function of somebody's package rather than one of ours."""
    return ":" in name


def call(key: str, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What somebody's function gives, with its mistakes in one line that names the key."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}={name!r}: the function fails: {str(error).splitlines()[0]!r}") from error


def load(key: str, name: str) -> Any:
    """The callable that `name` stands for; its module is imported.

    Args:
      key: where the name stands in the config, for messages.
      name: "package.module:function"; the function may be an attribute of an attribute, as "module:Class.method".

    Raises:
      UserError: not of that form, no such module, a module that fails when it is imported, no such attribute,
        or one that cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise UserError(f"{key}={name!r}: write package.module:function")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{key}={name!r}: there is no module {error.name!r}; install it, or add its folder to PYTHONPATH"
            ) from error
        raise UserError(f"{key}={name!r}: importing {module_name} fails: {error!r}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}={name!r}: {module_name} has no {attribute!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}={name!r}: that is a {type(found).__name__}, not a function")
    return found
