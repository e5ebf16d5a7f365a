"""Whether a plain value is of the kind that an annotation names: numbers, texts, lists of them."""

from __future__ import annotations

import collections.abc
import types
import typing
from pathlib import Path
from typing import Any

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
_LISTS = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, list, tuple)
_MAPPINGS = (collections.abc.Mapping, dict)


def is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; true where the kind is none that plain values have.

    A whole number is a number, true and false are none, and no text is taken for a number.

    Args:
        value: None, a bool, an int, a float, a str, or lists and dictionaries of them.
        kind: An annotation.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_kind(value, k) for k in inner)
    if origin is typing.Literal:
        return value in inner
    if kind is type(None) or kind is None:
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str or kind is Path:
        return isinstance(value, str)
    if (origin or kind) in _LISTS:
        several = tuple(k for k in inner if k is not Ellipsis)
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and Ellipsis not in inner and inner:
            return len(value) == len(inner) and all(is_of_kind(v, k) for v, k in zip(value, inner, strict=True))
        return all(is_of_kind(v, several[0]) for v in value) if several else True
    if (origin or kind) in _MAPPINGS:
        return isinstance(value, dict) and (len(inner) < 2 or all(is_of_kind(v, inner[1]) for v in value.values()))
    return True


def kind_in_words(kind: Any) -> str:
    """A kind as a user would say it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_in_words(k) for k in inner))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if kind is Path:
        return "a path"
    if (origin or kind) in _LISTS:
        return "a list"
    if (origin or kind) in _MAPPINGS:
        return "a dictionary"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
