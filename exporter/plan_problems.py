"""All that stands in the way of an export, at once: a check is made although another one failed."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from exporter.errors import ExportError
from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, check_request
from graphs.checkpoint import Checkpoint, tensor_problems
from graphs.config import DecoderConfig
from graphs.errors import CheckpointError
from graphs.families import Family
from graphs.loading import expected_shapes
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError

T = TypeVar("T")
USERS_ERRORS = (ArtifactError, CheckpointError, ExportError, FeedError, RuntimeMissingError, OSError)
# Options that are checked together, while all others are at their defaults.
OPTION_GROUPS = (
    ("layout",),
    ("weights",),
    ("max_batch",),
    ("client", "layout", "weights"),
    ("quantizer", "calibration"),
    ("verify",),
)
NOT_TO_THE_END = "config.json was not read to its end: more of it may be refused once that is mended"
MOST_NAMES = 5  # of tensors, in one message


class Problems:
    """What would be refused, in words; each once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """One more."""
        if message not in self.messages:
            self.messages.append(message)

    def attempt(self, check: Callable[[], T]) -> T | None:
        """What `check` returns; None where it raises one of the user's errors, whose message is kept."""
        try:
            return check()
        except OSError as error:
            self.add(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except USERS_ERRORS as error:
            self.add(str(error))
        return None


def check_options(request: ExportRequest, problems: Problems) -> None:
    """Everything that is wrong with the options, whatever the checkpoint is."""
    for probe in _probes(request):
        problems.attempt(lambda probe=probe: check_request(probe))  # type: ignore[misc]


def _probes(request: ExportRequest) -> Iterator[ExportRequest]:
    """Requests with some of the options each, and then with all of them."""
    plain = ExportRequest(checkpoint=request.checkpoint, out=request.out, verify=False)
    for names in OPTION_GROUPS:
        yield dataclasses.replace(plain, **{name: getattr(request, name) for name in names})
    for target in request.targets:  # each for itself, whatever is wrong with the layout
        layout = request.layout if request.layout in LAYOUTS else plain.layout
        yield dataclasses.replace(plain, targets=(target,), layout=layout)
    yield request


def read_config(family: Family, raw: Mapping[str, Any], problems: Problems) -> DecoderConfig | None:
    """config.json; None where something of it is refused.

    A key that is refused is left out and the rest read again, so that the next one is found as well.
    """
    left, removed = raw, set[tuple[str, ...]]()
    while True:
        try:
            config = family.parse_config(left)
        except CheckpointError as error:
            shorter = None if error.key in removed else _without(left, error.key)
            if error.key not in removed:
                problems.add(str(error))
            if shorter is None:
                problems.add(NOT_TO_THE_END)
                return None
            removed.add(error.key)
            left = shorter
        else:
            return None if removed else config


def _without(raw: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """A copy without the key at `path`, or without the object where it is missing; None where there is neither."""
    for length in range(len(path), 0, -1):
        shorter = copy.deepcopy(dict(raw))
        at: Any = shorter
        for key in path[: length - 1]:
            at = at.get(key) if isinstance(at, dict) else None
        if isinstance(at, dict) and at.pop(path[length - 1], None) is not None:
            return shorter
    return None


def check_tensors(
    family: Family, config: DecoderConfig, checkpoint: Checkpoint, problems: Problems
) -> dict[str, list[str]]:
    """{kind of problem: each tensor that has it}, from the files' headers alone."""
    found = tensor_problems(
        checkpoint,
        expected_shapes(family, config),
        family.is_ignorable,
        family.duplicates(config),
        read_weights=False,
    )
    by_kind: dict[str, list[str]] = {}
    for kind, text in found:
        by_kind.setdefault(kind, []).append(text)
    for kind, texts in by_kind.items():
        more = f" and {len(texts) - MOST_NAMES} more" if len(texts) > MOST_NAMES else ""
        count = f"{len(texts)} tensor{'s' * (len(texts) > 1)}"
        problems.add(f"{checkpoint.folder}: {kind}, {count}: {'; '.join(texts[:MOST_NAMES])}{more}")
    return by_kind
