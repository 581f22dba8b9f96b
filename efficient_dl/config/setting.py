"""One setting: its type, its range, the error that explains both, and its text in TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, get_type_hints

from efficient_dl.errors import ConfigError


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    words: tuple[str, ...] | None = None,
    required: bool = False,
) -> Any:
    """A field with its explanation and its range.

    low, high: the range with its ends; above, below: without. words: the strings allowed (for a field that
    also takes numbers: the strings that are no numbers). required: an empty string is an error.
    """
    rule = {"help": help, "low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata={**rule, "words": words, "required": required})


@dataclass(frozen=True)
class Section:
    """One table of the configuration; its fields are checked, and whole numbers made floats where due."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, checked(type(self), one.name, getattr(self, one.name)))


@cache
def rules_of(section: type[Section]) -> dict[str, Mapping[str, Any]]:
    """What `setting` was told, by the name of the field."""
    return {one.name: one.metadata for one in dataclasses.fields(section)}


@cache
def kinds_of(section: type[Section]) -> dict[str, Any]:
    """The type of each field, by its name."""
    hints = get_type_hints(section)
    return {one.name: hints[one.name] for one in dataclasses.fields(section)}


def suggestion(word: str, known: Iterable[str]) -> str:
    """The fix line for an unknown name: the closest known one, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(known)}"


def checked(section: type[Section], name: str, value: Any, where: str | None = None) -> Any:
    """The value in the setting's own type, or ConfigError. name: a field of the section."""
    rule, kind = rules_of(section)[name], kinds_of(section)[name]
    typed = _typed(kind, value)
    if typed is not None and _in_range(rule, typed):
        return typed
    default = to_toml_value(next(one.default for one in dataclasses.fields(section) if one.name == name))
    close = difflib.get_close_matches(str(value).lower(), rule["words"] or (), n=1)
    raise ConfigError(
        f"{section.section}.{name} cannot be {value!r}",
        expected=_expected(kind, rule),
        found=f"{value!r} ({type(value).__name__})",
        where=where,
        fix=f"did you mean {close[0]}?" if close else f"{rule['help']}; the default is {default}",
    )


def _typed(kind: Any, value: Any) -> Any:
    """The value as kind, None if it is not of it. A whole number may stand for a float, a bool never."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is int:
        return value if number and isinstance(value, int) else None
    if kind is str:
        return value if isinstance(value, str) and _is_unicode(value) else None
    if kind is float:
        return _finite(value) if number else None
    if kind == int | str:
        return _typed(int if number else str, value)
    if kind == float | str:
        return _finite(value) if number else _typed(str, value)
    if kind == tuple[float, float] and isinstance(value, (list, tuple)):
        pair = tuple(_typed(float, one) for one in value)
        return None if len(pair) != 2 or None in pair else pair
    return None


def _finite(value: float) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _is_unicode(value: str) -> bool:
    """False for lone surrogates (a file name that is not UTF-8), which no TOML file can hold."""
    return not any(0xD800 <= ord(char) <= 0xDFFF for char in value)


def _in_range(rule: Mapping[str, Any], value: Any) -> bool:
    if isinstance(value, str):
        return (rule["words"] is None or value in rule["words"]) and not (rule["required"] and not value)
    if isinstance(value, tuple):
        return all(_in_range(rule, one) for one in value)
    low, high, above, below = (rule[name] for name in ("low", "high", "above", "below"))
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


_KIND_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    float | str: "a number",
    int | str: "a whole number",
    tuple[float, float]: "two numbers",
}
_BOUND_WORDS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}


def _expected(kind: Any, rule: Mapping[str, Any]) -> str:
    words = " | ".join(rule["words"] or ())
    if kind is str:
        return words or ("text that is not empty" if rule["required"] else "text")
    bounds = [f"{word} {rule[name]:g}" for name, word in _BOUND_WORDS.items() if rule[name] is not None]
    numbers = ", ".join([_KIND_WORDS[kind], *bounds])
    return f"{words} or {numbers}" if words else numbers


def to_toml_value(value: Any) -> str:
    """A setting's value as TOML; read back, it is the same value, floats to the last bit."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(to_toml_value(one) for one in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
