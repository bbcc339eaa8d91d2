"""A decoder's configuration as the manifest holds it."""

import dataclasses
import json
from typing import Any

from graphs.config import DecoderConfig


def config_as_json(config: DecoderConfig) -> dict[str, Any]:
    """Plain data, as JSON gives it back: what two manifests hold can be compared."""
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return data


def differing_keys(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Where two configurations differ, such as layer_kinds.full_attention.rope.theta."""
    paths = []
    for key in first.keys() | second.keys():
        ours, theirs = first.get(key), second.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            paths += [f"{key}.{path}" for path in differing_keys(ours, theirs)]
        elif ours != theirs:
            paths.append(key)
    return sorted(paths)
