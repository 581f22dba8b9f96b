"""Configurations from TOML files, from dictionaries and from `section.key=value`, and back to TOML."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficient_dl.config.schema import SECTIONS, Config
from efficient_dl.config.setting import Section, checked, kinds_of, rules_of, suggestion, to_toml_value
from efficient_dl.errors import ConfigError


def load_config(path: str | Path) -> Config:
    """Read a TOML file; what it leaves out keeps its default. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        fix = _similar_file(path)
        raise ConfigError("there is no such configuration file", found=str(path), fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        problem = "the configuration file cannot be read"
        raise ConfigError(problem, found=str(error), where=str(path), fix="give a text file") from None
    return from_toml(text, where=str(path))


def from_toml(text: str, where: str = "TOML text") -> Config:
    """The configuration that a TOML text describes; `where` is named in errors. Raises ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        fix = 'lines look like: lr = 0.001, name = "gpt" or [train]'
        raise ConfigError("the configuration is not TOML", found=str(error), where=where, fix=fix) from None
    return from_dict(table, where)


def from_dict(table: Mapping[str, Any], where: str = "a dictionary") -> Config:
    """The configuration of nested dictionaries {section: {key: value}}. Raises ConfigError."""
    sections: dict[str, Any] = {}
    for name, entries in table.items():
        kind = _section_kind(name, where)
        if not isinstance(entries, Mapping):
            fix = f"write [{name}] and its keys below"
            raise ConfigError(f"{name} is a section", found=f"{name} = {entries!r}", where=where, fix=fix)
        for key in entries:
            _check_key(kind, key, where)
        sections[name] = kind(**{key: checked(kind, key, value, where) for key, value in entries.items()})
    return Config(**sections)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of config with each "section.key=value" put in, the last one winning. Raises ConfigError.

    A value is written as in TOML; strings need no quotes: "compression.bits=2.0", "data.name=digits",
    "optimizer.betas=[0.9, 0.95]" or "optimizer.betas=0.9,0.95", "run.out=".
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            fix = _home_of(key.strip()) or "for example train.steps=100"
            raise ConfigError("not a setting", expected="section.key=value", found=text, fix=fix)
        changes.setdefault(section, {})[name] = _parsed(_section_kind(section, text), name, value, text)
    sections: dict[str, Any] = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in changes.items()
    }
    return dataclasses.replace(config, **sections)


def to_toml(config: Config, explain: bool = False) -> str:
    """TOML text that `from_toml` turns back into an equal configuration; explain: with comments."""
    tables: list[str] = []
    for name, kind in SECTIONS.items():
        lines = [f"[{name}]"]
        for key, rule in rules_of(kind).items():
            value = to_toml_value(getattr(getattr(config, name), key))
            lines.append(f"{key} = {value}" + (f"  # {_explained(rule)}" if explain else ""))
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _explained(rule: Mapping[str, Any]) -> str:
    words = f" ({' | '.join(rule['words'])})" if rule["words"] else ""
    return f"{rule['help']}{words}"


def _section_kind(name: str, where: str) -> type[Section]:
    if name not in SECTIONS:
        fix = _home_of(name) or suggestion(name, SECTIONS)
        raise ConfigError(f"unknown section {name!r}", where=where, fix=fix)
    return SECTIONS[name]


def _check_key(section: type[Section], name: str, where: str) -> None:
    if name not in rules_of(section):
        fix = _home_of(name) or suggestion(name, rules_of(section))
        raise ConfigError(f"unknown setting {section.section}.{name}", where=where, fix=fix)


def _home_of(name: str) -> str | None:
    """The fix line for a setting that stands in the wrong section, None if no section has it."""
    homes = [f"{section}.{name}" for section, kind in SECTIONS.items() if name in rules_of(kind)]
    return f"did you mean {' or '.join(homes)}?" if homes else None


def _parsed(section: type[Section], name: str, text: str, where: str) -> Any:
    """The value that the text right of an override's "=" means for this setting."""
    _check_key(section, name, where)
    kind, text = kinds_of(section)[name], text.strip()
    if kind is str and text[:1] not in ("'", '"'):
        return checked(section, name, text, where)
    shown = f"[{text}]" if kind == tuple[float, float] and not text.startswith("[") else text
    try:
        value = tomllib.loads(f"value = {shown}")["value"]
    except tomllib.TOMLDecodeError:
        value = {"true": True, "false": False}.get(text.lower(), text) if kind is bool else text
    return checked(section, name, value, where)


def _similar_file(path: Path) -> str:
    near = sorted(one.name for one in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, near, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "give the path of a .toml file"
