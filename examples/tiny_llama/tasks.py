"""The three tasks the tiny Llama knows: training lines, held-out problems and an exact-match scorer.

    add      27+58=            85
    sort     sort 52914=       12459
    reverse  reverse planet=   tenalp

A prompt ends in "="; its completion is the answer alone, after which the model must emit </s>.
A hash of the problem decides whether it is held out, so training and evaluation are disjoint by construction.
Only the standard library is used here: a test of an exported graph can score it without torch.
"""

import hashlib
import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_DIGITS = 6  # of a `sort` problem
MAX_LETTERS = 8  # of a `reverse` problem
MAX_ANSWER_CHARS = max(MAX_DIGITS, MAX_LETTERS)
MAX_PROBLEMS = 500  # held-out problems per task
HELD_OUT_ONE_IN = 10
EVALUATION_SEED = 20240

AnswerFn = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Problem:
    """One prompt, its only right answer, and the key that decides on which side of the split it falls."""

    prompt: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        """True for about one problem in HELD_OUT_ONE_IN, the same ones on every machine and Python version."""
        digest = hashlib.sha256(self.key.encode("ascii")).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _below(rng: random.Random, limit: int) -> int:
    # Only random() is promised to give the same sequence in later Python versions; randrange and choices are not.
    return int(rng.random() * limit)


def _add(rng: random.Random) -> Problem:
    a, b = _below(rng, 100), _below(rng, 100)
    # One key for a+b and b+a: otherwise the mirror image of a held-out sum could be trained on.
    return Problem(f"{a}+{b}=", str(a + b), key=f"{min(a, b)}+{max(a, b)}")


def _sort(rng: random.Random) -> Problem:
    digits = [str(_below(rng, 10)) for _ in range(1 + _below(rng, MAX_DIGITS))]
    prompt = f"sort {''.join(digits)}="
    return Problem(prompt, "".join(sorted(digits)), key=prompt)


def _reverse(rng: random.Random) -> Problem:
    word = "".join(string.ascii_lowercase[_below(rng, 26)] for _ in range(1 + _below(rng, MAX_LETTERS)))
    prompt = f"reverse {word}="
    return Problem(prompt, word[::-1], key=prompt)


TASKS: dict[str, Callable[[random.Random], Problem]] = {"add": _add, "sort": _sort, "reverse": _reverse}


def training_problems(task: str, *, seed: int) -> Iterator[Problem]:
    """Yield problems of one task without end, never a held-out one."""
    rng = random.Random(seed)
    while True:
        problem = TASKS[task](rng)
        if not problem.held_out:
            yield problem


def evaluation_problems(task: str, *, count: int = MAX_PROBLEMS) -> list[Problem]:
    """Return the first `count` of the task's fixed list of different held-out problems."""
    if not 1 <= count <= MAX_PROBLEMS:
        raise ValueError(f"count must be from 1 to {MAX_PROBLEMS}, got {count}")
    rng = random.Random(EVALUATION_SEED)
    problems: dict[str, Problem] = {}  # by prompt, in the order drawn
    while len(problems) < count:
        problem = TASKS[task](rng)
        if problem.held_out:
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def score(answer_fn: AnswerFn, *, count: int = MAX_PROBLEMS) -> dict[str, float]:
    """Return each task's share (0 to 1) of held-out problems whose completion equals the answer exactly.

    `answer_fn` is called once per task with `count` prompts; it returns their completions in the same order, as text
    without special tokens. Let it make MAX_ANSWER_CHARS + 1 tokens: an answer that does not stop is then a wrong one.

    Raises:
        ValueError: the number of completions is not the number of prompts.
    """
    accuracy = {}
    for task in TASKS:
        problems = evaluation_problems(task, count=count)
        completions = answer_fn([problem.prompt for problem in problems])
        if len(completions) != len(problems):
            raise ValueError(f"{task}: expected {len(problems)} completions, got {len(completions)}")
        right = sum(text == problem.answer for text, problem in zip(completions, problems, strict=True))
        accuracy[task] = right / len(problems)
    return accuracy


if __name__ == "__main__":  # tasks.jsonl, which the quality report of an export reads
    for task in TASKS:
        for problem in evaluation_problems(task, count=200):
            print(json.dumps({"task": task, "prompt": problem.prompt, "answer": problem.answer}))
