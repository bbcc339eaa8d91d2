"""Whether a smoke test sees a mutant, and whether the parity gate does."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exporter.verify import verify_artifact
from runtimes.artifact import Artifact
from runtimes.decoding import Decoding
from runtimes.parity import make_case
from runtimes.runner import Runner
from runtimes.verification import Targets, artifact_targets
from tests.mutants.inject import inject, mutate_targets
from tests.mutants.mutant import Mutant
from tests.mutants.subjects import Workshop

SMOKE_SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a mutant."""

    mutant: Mutant
    smoke: str  # what a smoke test finds wrong with it; empty: nothing
    same_text: bool  # it writes the same text as the good artifact does, for one prompt
    failed: tuple[str, ...]  # the rungs that failed

    @property
    def caught(self) -> bool:
        """The gate refuses it."""
        return bool(self.failed)

    @property
    def counts(self) -> bool:
        """A smoke test lets it pass."""
        return not self.smoke


class Gate:
    """Judges mutants of artifacts that a workshop makes."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self._good: dict[str, list[list[int]]] = {}  # the text of each good artifact

    def judge(self, mutant: Mutant) -> Verdict:
        """A smoke test, then what `export-llm verify ARTIFACT --reference CHECKPOINT` does once hashes are checked."""
        good = self.workshop.artifact(mutant.artifact)
        if mutant.artifact not in self._good:
            self._good[mutant.artifact] = write_text(good, _first(artifact_targets(good, "cpu")))
        folder = self.workshop.folder / "mutant"
        try:
            faulty = inject(mutant, good, folder)
            targets = mutate_targets(mutant, artifact_targets(faulty, "cpu"))
            smoke, text = "", None
            try:
                text = write_text(faulty, _first(targets))
            except Exception as error:  # whatever it is, anyone would see it
                smoke = f"{type(error).__name__}: {error}"
            failed = () if smoke else self._failed_rungs(faulty, targets, mutant.artifact)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Verdict(mutant=mutant, smoke=smoke, same_text=text == self._good[mutant.artifact], failed=failed)

    def _failed_rungs(self, artifact: Artifact, targets: Targets, name: str) -> tuple[str, ...]:
        summary = verify_artifact(artifact, targets, self.workshop.reference(name))
        rungs = tuple(rung.name for report in summary.reports for rung in report.rungs if not rung.passed)
        assert bool(rungs) != summary.passed
        return rungs


def _first(targets: Targets) -> Callable[[], Runner]:
    return next(iter(targets.values()))


def write_text(artifact: Artifact, opened: Callable[[], Runner]) -> list[list[int]]:
    """A naive smoke test: it loads, reads a prompt (and a picture) and writes some tokens from finite logits.

    Raises:
        AssertionError: logits are of the wrong shape or not finite.
    """
    manifest = artifact.manifest
    vocab_size = int(manifest.graphs["decoder"].signature.outputs[0].shape[-1])
    encoder = None if manifest.vision is None else manifest.graphs["vision_encoder"].signature
    case = make_case(vocab_size, manifest.cache, 1, SMOKE_SEED, encoder=encoder)
    with opened() as runner:
        decoding = Decoding(runner)
        logits = decoding.prefill(case.prompts, case.images)
        tokens = []
        for _ in range(case.greedy_steps):
            assert logits.shape == (len(case.prompts), vocab_size), f"logits of shape {logits.shape}"
            assert np.isfinite(logits).all(), "logits are not finite"
            tokens.append(logits.argmax(axis=-1))
            logits = decoding.decode(tokens[-1])
    return np.stack(tokens, axis=1).tolist()


def make_gate(folder: Path) -> Gate:
    """A gate that keeps what it makes in `folder`."""
    return Gate(Workshop(folder))
