"""Functions from other people's packages, named in a config as "package.module:function"."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from slm_assist.errors import UserError, nearest


def is_plugin(name: str) -> bool:
    """Whether a config's value names a function of somebody's package rather than one of ours, or a model (`hf:`)."""
    return ":" in name and not name.startswith("hf:")


def in_use(config: Any) -> list[str]:
    """The functions of somebody's own that take part in an update by this config, as "key=package.module:function"."""
    named = {f"{section}.{key}": config[section][key] for section, key in IN_UPDATES}
    return [f"{key}={name}" for key, name in named.items() if is_plugin(name) and "/" not in name]


IN_UPDATES = (
    ("assist", "schedule"), ("assist", "teacher"), ("assist", "token_weight"), ("represent", "schedule"),
    ("select", "score"), ("select", "rule"), ("data", "objective"),
)  # fmt: skip


def call(key: str, name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What somebody's function gives, with its mistakes in one line that names the key."""
    try:
        return function(*arguments, **named)
    except UserError:
        raise
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        raise UserError(f"{key}={name!r}: the function fails: {type(error).__name__}: {words}") from error


def check_parameters(key: str, name: str, function: Callable[..., Any], *parameters: str, **named: str) -> None:
    """Raises `UserError` unless `function` can be called with such arguments, by place and by name."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins Python knows none
        return
    try:
        signature.bind(*parameters, **named)
    except TypeError as error:
        wanted = ", ".join((*parameters, *named))
        raise UserError(f"{key}={name!r}: it takes {signature}; write it for ({wanted})") from error


def check_shape(key: str, name: str, found: Any, wanted: tuple[int, ...], what: str) -> None:
    """Raises `UserError` unless `found`, what somebody's function gave, is an array of the shape `wanted`.

    Args:
      what: the array is, for people, as "a weight for each token".
    """
    shape = getattr(found, "shape", None)
    if shape != wanted:
        given = type(found).__name__ if shape is None else f"shape {shape}"
        raise UserError(f"{key}={name!r}: gave {given}; return {what}, here of shape {wanted}")


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
