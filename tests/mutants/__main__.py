"""`make mutants`: every mutant must be caught, and nothing else.

python -m tests.mutants [--only WORDS] [--seeds N]
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the other tests' checkpoints are described

from tests.mutants.catalog import MUTANTS
from tests.mutants.false_alarms import SEEDS, Verified, all_good, verify_many
from tests.mutants.gate import Verdict, make_gate
from tests.mutants.mutant import KINDS, Mutant
from tests.mutants.operators import operators_once

ONLY_ERRORS = 3


def judge_all(mutants: Iterable[Mutant], folder: Path) -> list[Verdict]:
    """Judge each, artifact by artifact, and say so."""
    gate, verdicts = make_gate(folder), []
    for mutant in sorted(mutants, key=lambda mutant: mutant.artifact):
        verdict = gate.judge(mutant)
        verdicts.append(verdict)
        state = "caught" if verdict.caught else "MISSED" if verdict.counts else "not a mutant: a smoke test sees it"
        print(f"{mutant.artifact:16} {mutant.kind:8} {mutant.name}: {state}{_by(verdict)}", flush=True)
    return verdicts


def _by(verdict: Verdict) -> str:
    if verdict.smoke:
        return f" ({verdict.smoke})"
    return f" by {', '.join(dict.fromkeys(verdict.failed))}" if verdict.failed else ""


def table(verdicts: list[Verdict]) -> str:
    """How many of each kind were caught, and how many write the same text as the good artifact."""
    lines = [f"{'':10}{'mutants':>10}{'caught':>10}{'missed':>10}{'same text':>12}"]
    for kind in KINDS:
        of_kind = [verdict for verdict in verdicts if verdict.mutant.kind == kind]
        caught, same = (sum(getattr(each, name) for each in of_kind) for name in ("caught", "same_text"))
        lines.append(f"{kind:10}{len(of_kind):10}{caught:10}{len(of_kind) - caught:10}{same:12}")
    return "\n".join(lines)


def score(verdicts: list[Verdict], verified: list[Verified]) -> str:
    """The two counts."""
    caught, alarms = sum(each.caught for each in verdicts), sum(bool(each.failed) for each in verified)
    return (
        f"caught {caught} of {len(verdicts)} ({len(verdicts) - caught} missed);"
        f" false alarms {alarms} of {len(verified):,} verifications"
    )


def passed(verdicts: list[Verdict], verified: list[Verified]) -> bool:
    """Every mutant was caught, each of them is one, and no good artifact was refused."""
    return all(each.caught and each.counts for each in verdicts) and not any(each.failed for each in verified)


def watch(verified: Iterable[Verified], seeds: int) -> list[Verified]:
    """All of them; each false alarm is told, and each artifact once."""
    found = []
    for each in verified:
        found.append(each)
        name = f"{each.good.family} {each.good.precision} {each.good.layout}"
        if each.failed:
            print(f"FALSE ALARM {name}, seed {each.seed}: {', '.join(each.failed)}", flush=True)
        if each.seed == seeds - 1:
            print(f"good artifact {name}: {seeds} verifications", flush=True)
    return found


def main() -> int:
    """Exit code 1 unless the score is full."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name, kind or artifact holds this")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each good artifact; 0: no false alarms")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if options.only in f"{each.name} {each.kind} {each.artifact}"]
    np.seterr(invalid="ignore")  # a mutant may compute what is no number
    onnxruntime.set_default_logger_severity(ONLY_ERRORS)  # it warns of weights that a mutant does not read
    with tempfile.TemporaryDirectory() as folder, operators_once():
        verdicts = judge_all(chosen, Path(folder))
        good = all_good() if options.seeds else []
        verified = watch(verify_many(good, range(options.seeds), Path(folder) / "good"), options.seeds)
    print(table(verdicts))
    print(score(verdicts, verified))
    return 0 if passed(verdicts, verified) else 1


if __name__ == "__main__":
    sys.exit(main())
