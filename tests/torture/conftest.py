"""Valid inputs, made once, and copies of them to be damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.torture.seeds import make_seeds


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid inputs; do not change them."""
    folder = tmp_path_factory.mktemp("torture") / "seeds"
    make_seeds(folder)
    return folder


@pytest.fixture
def copy(seeds: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of the folders of valid inputs, to be damaged."""
    return lambda name: Path(shutil.copytree(seeds / name, tmp_path / name))
