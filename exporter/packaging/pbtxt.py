"""Protocol buffers' text format, from plain data."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

INDENT = "  "
WIDTH = 110  # a message that fits stands on one line


class Word(str):
    """A value that stands without quotes: the name of an enum's entry."""


def to_text(message: Mapping[str, Any], depth: int = 0) -> str:
    """A message's fields, one to a line: mappings are messages, sequences of mappings are messages that repeat."""
    lines = []
    for name, value in message.items():
        if isinstance(value, Mapping):
            lines.append(_nested(name, value, depth))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and isinstance(value[0], Mapping):
                lines += [_nested(name, each, depth) for each in value]
            else:
                lines.append(f"{INDENT * depth}{name}: [{', '.join(map(_scalar, value))}]\n")
        else:
            lines.append(f"{INDENT * depth}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _nested(name: str, message: Mapping[str, Any], depth: int) -> str:
    fields, indent = to_text(message, depth + 1), INDENT * depth
    line = f"{indent}{name} {{ {' '.join(field.strip() for field in fields.splitlines())} }}\n"
    return line if len(line) <= WIDTH else f"{indent}{name} {{\n{fields}{indent}}}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)  # its escapes are among those of the text format
    assert isinstance(value, int), f"{value!r} has no place in a config.pbtxt"
    return str(value)
