"""Builds nested dataclasses from nested dictionaries, with errors that name the key."""

from __future__ import annotations

import difflib
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


_hints = functools.cache(typing.get_type_hints)


def build(kind: type, content: Any, prefix: str = "", known: Iterable[str] = ()) -> Any:
    """``kind(**content)`` for a dataclass with fields of plain types, Literal, tuple, Mapping and further dataclasses.

    Raises:
        ValueError: for unknown keys, naming the nearest known one, and for values of another type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{prefix.rstrip('.')}: expected a section, got {content!r}")
    kinds = _hints(kind)
    known = known or tuple(keys(kind))
    for key in content:
        if key not in kinds:
            raise ValueError(f"unknown key {prefix}{key}{_nearest_key(prefix + key, known)}")
    return kind(**{key: _value(kinds[key], value, f"{prefix}{key}", known) for key, value in content.items()})


def keys(kind: type, prefix: str = "") -> Iterable[str]:
    """The dotted names of all fields."""
    kinds = _hints(kind)
    for f in fields(kind):
        if is_dataclass(kinds[f.name]):
            yield from keys(kinds[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested dictionaries as pairs of dotted keys and values."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(settings: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flat`."""
    result: dict[str, Any] = {}
    for key, value in settings.items() if isinstance(settings, Mapping) else settings:
        *path, last = key.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the changes, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        merged[key] = merge(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` with the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _nearest_key(key: str, known: Iterable[str]) -> str:
    """The known key with the same last part, or else the nearest one."""
    last = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    return f" (did you mean {same[0]!r}?)" if same else nearest(key, known)


def _value(kind: Any, value: Any, key: str, known: Iterable[str]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return build(typing.cast(type, kind), value, f"{key}.", known)
    if origin is Literal:
        if value not in arguments:
            guess = nearest(value, arguments) if isinstance(value, str) else ""
            raise ValueError(f"{key}: expected one of {', '.join(map(str, arguments))}, got {value!r}{guess}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: expected a list, got {value!r}")
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = [arguments[0]] * len(value) if repeated else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{key}: expected {len(kinds)} values, got {value!r}")
        return tuple(_value(k, v, key, known) for k, v in zip(kinds, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}: expected a section, got {value!r}")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{key}: expected {_WORDS[kind]}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{key}: expected a finite number, got {value!r}")
    return value
