"""A sampler's options, read from the signature of the function that compiles it.

The annotation of an option says what may be given: ``Literal[...]`` lists every choice, ``bool`` is
a switch, ``int`` and ``float`` are numbers whose range the compiler checks itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigurationError, choose

__all__ = ["check_options", "choices_of", "defaults_of"]

_NOT_OPTIONS = {"trajectory", "clip", "return"}
_SWITCH = (False, True)


def defaults_of(build: Callable[..., Any]) -> dict[str, Any]:
    """The options of a sampler and what they are when nobody says otherwise."""
    parameters = inspect.signature(build).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _NOT_OPTIONS}


def choices_of(build: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The possible values of every option that has a list of them."""
    kinds = _kinds(build).items()
    return {
        name: _SWITCH if kind is bool else get_args(kind)
        for name, kind in kinds
        if kind is bool or get_origin(kind) is Literal
    }


def check_options(sampler: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options a sampler does not have, and values that are not of an option's kind.

    Raises:
        ConfigurationError: the message has what is possible, and the nearest name.
    """
    kinds = _kinds(build)
    for name, value in options.items():
        kind = kinds[choose(f"option of the {sampler} sampler", name, kinds)]
        wanted = _wanted(kind, value)
        if wanted:
            raise ConfigurationError(
                f"option {name} of the {sampler} sampler must be {wanted}; got {value!r}. "
                f"Left out it is {defaults_of(build)[name]!r}."
            )


def _kinds(build: Callable[..., Any]) -> dict[str, Any]:
    return {k: kind for k, kind in get_type_hints(build).items() if k not in _NOT_OPTIONS}


def _wanted(kind: Any, value: Any) -> str | None:
    """What a value should have been, or None if it may be what it is."""
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if get_origin(kind) is Literal:
        possible = get_args(kind)
        if isinstance(value, str) == isinstance(possible[0], str) and not isinstance(value, bool):
            return None  # the compiler names the nearest
        return f"one of {', '.join(map(str, possible))}"
    number = Integral if kind is int else Real
    if isinstance(value, number) and not isinstance(value, bool):
        return None
    return "a whole number" if kind is int else "a number"
