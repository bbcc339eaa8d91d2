"""Hostile bytes and hostile JSON from valid ones, the same for the same random numbers."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

DEEP = 100_000  # levels of nesting, which no recursion survives
LONG = 5_000  # characters, or digits: more than Python reads as a number

# What stands where something else is expected; to be copied.
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**9, 10**12, 10**30, -(10**30), 0.5, 1.0, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf")),
    *("", " ", "1", "true", "null", "None", "\x00", "\ud800", "\x1b[2J", "[/red]", "%s%d{0}", "é" * 300, "a" * LONG),
    *("..", ".", "/", "../x", "../outside/config.json", "/etc/passwd", "/dev/zero", "a/b", "a\\b", "C:\\x", "~/x"),
    *("model.safetensors", "config.json", "manifest.json", "https://127.0.0.1:9/x", "{{ 1/0 }}", "__class__"),
    *([], {}, [[]], [None], {"": None}, {"a": 1}, [0] * 1000, [-1], ["a"], [1.5], {"__class__": "x"}),
    *("[" * 50 + "]" * 50, "(a+)+$", "(a|a)*b"),
)


def nested(levels: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def mutate_bytes(rng: Random, data: bytes, *, head: int | None = None) -> bytes:
    """One to four changes of some bytes; `head`: as a rule, of the first ones."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTES)(rng, data, min(len(data), head or len(data)) if rng.random() < 0.8 else len(data))
    return data


def _flip(rng: Random, data: bytes, head: int) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(max(1, head))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _set(rng: Random, data: bytes, head: int) -> bytes:
    at = rng.randrange(max(1, head))
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 8))) + data[at + 1 :]


def _lie(rng: Random, data: bytes, head: int) -> bytes:
    """Another number where one may stand."""
    number = rng.choice((0, 1, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1))
    format = rng.choice(("<Q", "<I", ">I", "<H", ">H"))
    size = struct.calcsize(format)
    at = rng.randrange(max(1, head))
    at -= at % rng.choice((1, 1, 2, 4, 8))
    return data[:at] + struct.pack(format, number % (1 << (8 * size))) + data[at + size :]


def _cut(rng: Random, data: bytes, head: int) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data) + 1), max(0, len(data) - 1)))]


def _append(rng: Random, data: bytes, head: int) -> bytes:
    return data + rng.choice((b"\x00", b"\n", data, rng.randbytes(16), b"\xff" * 4096))


def _repeat(rng: Random, data: bytes, head: int) -> bytes:
    start = rng.randrange(max(1, head))
    part = data[start : start + rng.randrange(1, 64)]
    return data[:start] + part * rng.choice((2, 3, 50)) + data[start + len(part) :]


def _drop(rng: Random, data: bytes, head: int) -> bytes:
    start = rng.randrange(max(1, head))
    return data[:start] + data[start + rng.randrange(1, 32) :]


_BYTES: tuple[Callable[[Random, bytes, int], bytes], ...] = (_flip, _set, _lie, _lie, _cut, _append, _repeat, _drop)


def mutate_json(rng: Random, text: bytes) -> bytes:
    """JSON with other values at some places, or that is none."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, text)
    made = to_text(mutate_tree(rng, json.loads(text)))
    return rng.choice(_TEXTS)(rng, made) if rng.random() < 0.25 else made


def mutate_tree(rng: Random, tree: Any) -> Any:
    """The same data (which is changed) with other values at one to four places."""
    if rng.random() < 0.03:
        return copy.deepcopy(rng.choice(VALUES))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.12 and isinstance(holder, dict):
            del holder[key]
        elif kind < 0.2 and isinstance(holder, dict):
            name = rng.choice((str(key).upper(), f"{key}_", "", "a" * 300, "\ud800", "../x", "\x1b[31m", "__class__"))
            holder[name] = holder.pop(key)
        elif kind < 0.26:
            holder[key] = nested(rng.choice((2, 20, 200)))
        elif kind < 0.36 and type(holder[key]) in (int, float):
            holder[key] = rng.choice(
                (-holder[key], holder[key] + 1, holder[key] * 1000, holder[key] / 3, str(holder[key]))
            )
        elif kind < 0.42:
            holder[key] = [holder[key]]
        elif kind < 0.5:
            other, name = rng.choice(places)
            holder[key] = json.loads(to_text(other[name])) if name in other or isinstance(other, list) else None
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _places(tree: Any, levels: int = 30) -> Iterator[tuple[Any, Any]]:
    """(list or dict, index or key) of every value inside."""
    keys: Any = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys)[:200]:
        yield tree, key
        if levels:
            yield from _places(tree[key], levels - 1)


def to_text(tree: Any) -> bytes:
    """JSON, with what it does not have (NaN, lone surrogates) as Python writes it."""
    return json.dumps(tree).encode()


def _twice(rng: Random, text: bytes) -> bytes:
    """Every key is there twice."""
    return b'{"model_type": 1, "weight_map": 2, ' + text[1:-1] + b", " + text[1:] if text[:1] == b"{" else text


_TEXTS: tuple[Callable[[Random, bytes], bytes], ...] = (
    _twice,
    lambda rng, text: b"[" * DEEP + text + b"]" * DEEP,
    lambda rng, text: b'{"a":' * DEEP + text + b"}" * DEEP,
    lambda rng, text: text.replace(b": 1", b": " + b"9" * LONG),
    lambda rng, text: text.replace(b": ", b': 1e999, "b": ', 1),
    lambda rng, text: text.replace(b": ", b': -Infinity, "b": ', 1),
    lambda rng, text: b"\xef\xbb\xbf" + text,
    lambda rng, text: text.decode().encode("utf-16"),
    lambda rng, text: text.replace(b"a", b"\xff", 1),
    lambda rng, text: text + b" {}",
    lambda rng, text: b"",
    lambda rng, text: b"\x00" * 64,
)
