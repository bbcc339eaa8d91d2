"""The boundary operators' rungs, measured once for each model: they do not look at the artifact, and cost the most."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from exporter import verify
from exporter.layouts.layout import Layout
from exporter.op_parity import op_rungs
from graphs.config import DecoderConfig
from runtimes.parity import Rung


@contextlib.contextmanager
def operators_once() -> Iterator[None]:
    """Within it, verifications of the same model share these rungs."""
    measured: dict[tuple[str, int, torch.dtype], list[Rung]] = {}

    def once(config: DecoderConfig, layout: Layout, dtype: torch.dtype) -> list[Rung]:
        key = (repr(config), id(layout), dtype)
        if key not in measured:
            measured[key] = op_rungs(config, layout, dtype)
        return measured[key]

    with mock.patch.object(verify, "op_rungs", once):
        yield
