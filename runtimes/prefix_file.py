"""Saved prefixes in safetensors files.

A file holds the token ids, the cache's tensors under their own names and in their own dtype, cut to the slots of those
tokens, and in its metadata what they were made with and the SHA-256 of all that.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import tensor_file
from runtimes.artifact import Manifest
from runtimes.errors import ArtifactError, FeedError
from runtimes.files import why_no_file
from runtimes.prefix import Prefix
from runtimes.signature import CacheSpec

FORMAT = "export-llm prefix 1"
TOKEN_IDS = "token_ids"

# What must be the same in the artifact that loads a prefix: {key of `fingerprint`: what is wrong when it is not}. The
# first that differs is named, so what follows from another comes after it.
_MUST_AGREE = {
    "precision": "another precision",
    "layout": "another layout",
    "config": "another model",
    "weights": "other weights",
}


def fingerprint(manifest: Manifest) -> dict[str, str]:
    """What a prefix depends on; max_len, which changes nothing that is in it, is not part of it."""
    weights = {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".safetensors")}
    return {
        "config": _sha256_of_json(manifest.config),
        "precision": manifest.precision,
        "layout": manifest.layout,
        "weights": _sha256_of_json(weights),
    }


def save_prefix(path: Path, prefix: Prefix, manifest: Manifest) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
        FeedError: it cannot be written there.
    """
    parts = [(TOKEN_IDS, "int64", np.array(prefix.token_ids, np.int64))]
    parts += [(name, prefix.dtypes[name], array) for name, array in prefix.tensors.items()]
    header, data = tensor_file.encode(parts)
    metadata = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest()} | fingerprint(manifest)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(tensor_file.join(header, metadata, data))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise FeedError(f"the prefix cannot be written to {path}: {error.strerror}") from None


def load_prefix(path: Path, manifest: Manifest) -> Prefix:
    """Read a file that save_prefix wrote with the same model, precision and weights.

    Raises:
        ArtifactError: no such file, a damaged one, or one that was made with something else.
        FeedError: it has more tokens than this artifact holds.
    """
    metadata, arrays, dtypes = _read(path)
    ours = fingerprint(manifest)
    for key, problem in _MUST_AGREE.items():
        if metadata.get(key) != ours[key]:
            shown = f" ({metadata.get(key)}, here {ours[key]})" if len(ours[key]) < 64 else ""
            raise ArtifactError(
                f"{path} was saved with {problem}{shown}: save the prefix again with this artifact (--save-prefix)"
            )
    token_ids = arrays.pop(TOKEN_IDS)
    prefix = Prefix(token_ids=tuple(map(int, token_ids)), tensors=arrays, dtypes=dtypes)
    cache = manifest.cache
    if len(token_ids) > cache.max_len:
        raise FeedError(
            f"{path} holds {len(token_ids)} tokens, but this artifact {cache.max_len}: export again with a larger"
            " --max-len"
        )
    if not _fits(prefix, cache):
        raise ArtifactError(f"{path} is damaged, save the prefix again: its tensors are not those of the cache")
    return prefix


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray], dict[str, str]]:
    """A file's metadata, its tensors, and the dtypes of those that belong to the cache."""
    if reason := why_no_file(path):  # a pipe would never answer
        raise ArtifactError(f"the prefix {path} cannot be read: {reason}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"the prefix {path} cannot be read: {error.strerror}") from None
    try:
        header, metadata, data = tensor_file.split(content)
        if metadata.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not a prefix that --save-prefix wrote")
        if hashlib.sha256(data).hexdigest() != metadata["sha256"]:
            raise ValueError("SHA-256 differs")
        arrays, dtypes = tensor_file.decode(header, data)
        if dtypes.pop(TOKEN_IDS) != "int64" or arrays[TOKEN_IDS].ndim != 1 or not arrays[TOKEN_IDS].size:
            raise ValueError("no token ids")
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged, save the prefix again: {str(error) or type(error).__name__}") from None
    return metadata, arrays, dtypes


def _fits(prefix: Prefix, cache: CacheSpec) -> bool:
    """Whether names, shapes and dtypes are those of the cache, which a runner may have kept in float32."""
    shapes = {name: array.shape for name, array in prefix.tensors.items()}
    dtypes = dict(zip(cache.past_names(), (tensor.dtype for tensor in cache.tensors), strict=True))
    return shapes == prefix.shapes(cache) and all(
        prefix.dtypes[name] in (dtype, "float32") for name, dtype in dtypes.items()
    )


def _sha256_of_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
