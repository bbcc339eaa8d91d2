"""Saved prefixes in safetensors files.

A file holds the token ids, the cache's tensors under their own names and in their own dtype, cut to the slots of those
tokens, and in its metadata what they were made with and the SHA-256 of all that. It is written and read without the
safetensors library, whose NumPy side has no bfloat16.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Manifest
from runtimes.errors import ArtifactError, FeedError
from runtimes.prefix import Prefix
from runtimes.signature import CacheSpec

FORMAT = "export-llm prefix 1"
TOKEN_IDS = "token_ids"

# dtype: (safetensors' name for it, how NumPy holds it; bfloat16 as the upper half of a float32)
_STORED: dict[str, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
    "int64": ("I64", np.int64),
}
_DTYPES = {stored: dtype for dtype, (stored, _) in _STORED.items()}

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
    header: dict[str, Any] = {}
    data = bytearray()
    for name, dtype, array in parts:
        encoded = _encode(array, dtype)
        offsets = [len(data), len(data) + len(encoded)]
        header[name] = {"dtype": _STORED[dtype][0], "shape": list(array.shape), "data_offsets": offsets}
        data += encoded
    digest = hashlib.sha256(data).hexdigest()
    header["__metadata__"] = {"format": FORMAT, "sha256": digest} | fingerprint(manifest)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(len(text).to_bytes(8, "little") + text + data)
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
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"the prefix {path} cannot be read: {error.strerror}") from None
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        metadata = header.pop("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not a prefix that --save-prefix wrote")
        data = content[start:]
        if hashlib.sha256(data).hexdigest() != metadata["sha256"]:
            raise ValueError("SHA-256 differs")
        arrays, dtypes = {}, {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            dtypes[name] = _DTYPES[entry["dtype"]]
            arrays[name] = _decode(data[first:end], dtypes[name]).reshape(entry["shape"])
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


def _encode(array: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes; exact, because the numbers come from tensors of that dtype."""
    if dtype == "bfloat16":
        array = np.ascontiguousarray(array, np.float32).view(np.uint32) >> np.uint32(16)
    return np.ascontiguousarray(array, np.dtype(_STORED[dtype][1]).newbyteorder("<")).tobytes()


def _decode(data: bytes, dtype: str) -> np.ndarray:
    """The inverse, flat: floats as float32."""
    array = np.frombuffer(data, np.dtype(_STORED[dtype][1]).newbyteorder("<"))
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.int64 if dtype == "int64" else np.float32)


def _sha256_of_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
