"""Checks of single values against type annotations, and the nearest name to a wrong one."""

import difflib
import math
import types
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt


def check_value(value: Any, annotation: Any, name: str) -> Any:
    """The value (an int as a float where one is asked for); ValueError if type or range is wrong.

    `name` is the field in the message.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        value = check_value(value, arguments[0], name)
        for constraint in arguments[1:] if value is not None else ():
            check_range(value, constraint, name)
        return value
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{name} is {value!r}; it must be {allowed(annotation)}")
        return value
    if origin in (typing.Union, types.UnionType):
        return check_union(value, annotation, name)
    if origin is tuple:
        if not isinstance(value, tuple) or not value:
            raise ValueError(f"{name} is {value!r}; it must be {allowed(annotation)}")
        return tuple(check_value(item, arguments[0], name) for item in value)
    if annotation is Any:
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not of_type(value, annotation):
        raise ValueError(f"{name} is {value!r}; it must be of type {allowed(annotation)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be finite")
    return value


def check_union(value: Any, annotation: Any, name: str) -> Any:
    """check_value where one of several annotations has to fit."""
    members = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if value is None and types.NoneType in typing.get_args(annotation):
        return None
    if len(members) == 1:
        return check_value(value, members[0], name)
    for member in members:
        try:
            return check_value(value, member, name)
        except ValueError:
            continue
    raise ValueError(f"{name} is {value!r}; it must be {allowed(annotation)}")


def of_type(value: Any, annotation: Any) -> bool:
    """Whether a value has the type of an annotation without parts; a bool is no int."""
    if typing.get_origin(annotation) is not None:
        return callable(value)
    if not isinstance(annotation, type):
        return True
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


def check_range(value: Any, constraint: Any, name: str) -> None:
    """Raises ValueError unless the number meets an annotated_types constraint."""
    tests: dict[type, Callable[[Any], bool]] = {
        Gt: lambda c: value > c.gt,
        Ge: lambda c: value >= c.ge,
        Lt: lambda c: value < c.lt,
        Le: lambda c: value <= c.le,
    }
    parts = constraint if isinstance(constraint, Interval) else [constraint]
    if not all(tests[type(part)](part) for part in parts if type(part) in tests):
        raise ValueError(f"{name} is {value!r}; it must be {bound(constraint)}")


def bound(constraint: Any) -> str:
    """An annotated_types constraint in words: '> 0', '>= 0 and <= 1'; '' for any other object."""
    if isinstance(constraint, Interval):
        return " and ".join(bound(part) for part in constraint)
    signs = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
    if type(constraint) not in signs:
        return ""
    sign, field = signs[type(constraint)]
    return f"{sign} {getattr(constraint, field)}"


def allowed(annotation: Any) -> str:
    """What an annotation allows, in words: 'float, > 0', \"one of 'a', 'b'\", 'int or None'."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return ", ".join([allowed(arguments[0]), *filter(None, map(bound, arguments[1:]))])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(allowed, arguments))
    if origin is tuple:
        return f"a tuple, each {allowed(arguments[0])}"
    if annotation is types.NoneType:
        return "None"
    return "function" if origin is not None else getattr(annotation, "__name__", str(annotation))


def nearest(name: str, names: Collection[str]) -> str:
    """'; did you mean X?', or the list of all names where none is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(map(repr, names)) or 'none'}"
