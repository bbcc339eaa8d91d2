"""Tables that are looked up: every row is compared with the checkpoint's, also those that no parity case reads."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from exporter.clients import artifact_checkpoint
from exporter.source import read_source
from exporter.table_check import check_tables
from graphs.checkpoint import StoredTensor
from runtimes.artifact import Artifact, open_artifact

TOKENS = "language_model.model.embed_tokens.weight"
TILES = "vision_model.pre_tile_positional_embedding.embedding.weight"


@pytest.fixture
def copy(tiny_vision_artifact: Artifact, tmp_path: Path) -> Artifact:
    """An artifact to be spoilt."""
    shutil.copytree(tiny_vision_artifact.folder, tmp_path / "copy")
    return open_artifact(tmp_path / "copy")


def _numbers(stored: StoredTensor) -> np.ndarray:
    return np.memmap(stored.path, np.float32, "r+", stored.offset, stored.shape)


def test_the_checkpoint_s_own_tables_pass(tiny_vision: Path, copy: Artifact) -> None:
    """Cast or not, they are the same."""
    for precision in ("fp32", "fp16", "bf16"):
        source = read_source(tiny_vision, precision)
        assert check_tables(source, source.checkpoint).passed
    assert check_tables(read_source(tiny_vision, "fp32"), artifact_checkpoint(copy)).passed


@pytest.mark.parametrize("table", [TOKENS, TILES])
@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_one_number_is_enough(table: str, value: float, tiny_vision: Path, copy: Artifact) -> None:
    """In the last row, of tokens or of aspect ratios; the rung says in which table, and how far it is off."""
    own = artifact_checkpoint(copy)
    numbers = _numbers(own.tensors[table])
    before = float(numbers[-1, 3])
    numbers[-1, 3] += value
    numbers.flush()
    rung = check_tables(read_source(tiny_vision, "fp32"), own)
    assert not rung.passed
    assert rung.note == f"worst: {table}"
    assert rung.max_error == pytest.approx(abs(float(np.float32(before + value)) - before) if value == 1.5 else np.inf)
