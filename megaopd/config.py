"""Configuration: frozen dataclasses filled from TOML and dotted overrides, strictly.

Importable without torch. Unknown keys, wrong types and impossible combinations are refused with
what was got, what was expected and how to fix it; the resolved configuration is saved with the run.
"""

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megaopd.errors import UserError

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict. UserError where it is missing or malformed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file {path}", expected="the path of a TOML file")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UserError(f"{path} is not valid TOML: {err}") from err


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set `section.key=value` overrides; the value is TOML, or a plain string where it is not."""
    for override in overrides:
        key, sep, raw = override.partition("=")
        if not sep or not key.strip():
            raise UserError(
                f"override {override!r}", expected="section.key=value", fix="e.g. optim.lr=1e-5"
            )
        try:
            value = tomllib.loads(f"value = {raw}")["value"]
        except tomllib.TOMLDecodeError:
            value = raw
        *sections, last = key.strip().split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"override {override!r}: {section} is not a section")
        target[last] = value
    return values


def build(cls: type[T], values: dict[str, Any]) -> T:
    """Make the dataclass `cls` from nested dicts, checking every key and type (pydantic, strict).

    Raises:
        UserError: an unknown key (with the nearest known one), a value of another type, or a
            combination that a section's own checks refuse.
    """
    _forbid_extra(cls)
    try:
        # Through JSON, because strict mode takes dicts for dataclasses from JSON only.
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as err:
        raise _user_error(cls, err) from err


def _forbid_extra(cls: Any) -> None:
    cls.__pydantic_config__ = ConfigDict(extra="forbid")
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):  # dict[str, X]: named sections
            if dataclasses.is_dataclass(part):
                _forbid_extra(part)


def _user_error(cls: Any, failure: ValidationError) -> UserError:
    first = failure.errors()[0]
    original = first.get("ctx", {}).get("error")
    if isinstance(original, UserError):
        return original
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        *sections, key = first["loc"]
        for section in sections:
            inner = typing.get_args(cls)
            cls = inner[1] if inner else typing.get_type_hints(cls)[str(section)]
        known = [field.name for field in dataclasses.fields(cls)]
        near = difflib.get_close_matches(str(key), known, 1)
        return UserError(
            f"unknown key {where}",
            expected="one of " + ", ".join(known),
            fix=f"did you mean {'.'.join([*map(str, sections), near[0]])}?"
            if near
            else "remove it",
        )
    if first["type"] == "missing":
        return UserError(f"{where} is not set", expected="a value: it has no default")
    message = first["msg"].removeprefix("Input should be ")
    return UserError(f"{where} = {first['input']!r}", expected=message)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested dicts; None, which TOML cannot say, is left out."""

    def prune(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: prune(v) for k, v in value.items() if v is not None}
        return [prune(v) for v in value] if isinstance(value, list | tuple) else value

    return prune(dataclasses.asdict(config))


def save(config: Any, path: Path) -> None:
    """Write the resolved configuration as TOML."""
    import tomli_w

    path.write_text(tomli_w.dumps(to_dict(config)))
