"""Entries of COCO-like JSON documents, checked one by one, with errors that name the entry and the value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refinedet_cli.errors import DataError

MAX_INT = 2**63 - 1


def kind_of(value: object) -> str:
    """Name the JSON type of a value."""
    kinds = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return kinds.get(type(value), "number")


def shown(value: object) -> str:
    """Write a value as JSON for a message, cut where it is long."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return f"a deeply nested {kind_of(value)}"
    return text if len(text) <= 80 else text[:77] + "..."


def named(entry: Mapping[str, Any]) -> str:
    """Name the id of an entry for a message, if it has one."""
    return f" (id {shown(entry['id'])})" if "id" in entry else ""


def list_of(document: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """Take a list from a document that has the key.

    Raises:
        DataError: it is not a list.
    """
    entries = document[key]
    if not isinstance(entries, list):
        raise DataError(f"{path}: {key} is a JSON {kind_of(entries)}", "it must be a list")
    return entries


def get(entry: object, key: str, where: str) -> Any:
    """Take a value from an entry.

    Raises:
        DataError: the entry is not an object or has no such key.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where} is a JSON {kind_of(entry)}", "it must be an object")
    if key not in entry:
        raise DataError(f"{where}{named(entry)} has no {key!r}", f"add {key!r}, or remove the entry")
    return entry[key]


def whole(entry: object, key: str, where: str) -> int:
    """Take a whole number of 64 bits; 3.0 passes, for tools that go through tables write ids so.

    Raises:
        DataError: it is missing or something else.
    """
    value = get(entry, key, where)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or abs(value) > MAX_INT:
        raise DataError(f"{where}: {key} is {shown(value)}", "it must be a whole number")
    return value


def is_number(value: object) -> bool:
    """Tell whether a value is a number that a float can hold; NaN and infinities are such."""
    return type(value) is float or (type(value) is int and abs(value) <= MAX_INT)


def category_names(entries: list[Any], path: Path) -> dict[int, str]:
    """Read the entries of ``categories``: the name of each id, in the file's order.

    Raises:
        DataError: there is none, an entry is not what it should be, or an id or name is there twice.
    """
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: categories[{index}]"
        identity, name = whole(entry, "id", where), get(entry, "name", where)
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where} (id {identity}): name is {shown(name)}", "give the class a name")
        if identity in names:
            raise DataError(f"{where}: id {identity} is {names[identity]!r} already", "give each class its own id")
        if name in names.values():
            raise DataError(f"{where} (id {identity}): the name {name!r} is there already", "merge the two classes")
        names[identity] = name
    if not names:
        raise DataError(f"{path} has no categories", "list the classes with id and name")
    return names
