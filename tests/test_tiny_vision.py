"""The shipped vision model, from a picture file to its answer: scores, the command, and what it refuses."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exporter.pipeline import ExportRequest, export
from runtimes.artifact import Artifact, open_artifact
from runtimes.generation import generate, read_stop_ids
from runtimes.images import ImageProcessor, show_images
from runtimes.runner import Runner, open_runner
from runtimes.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
COUNT = 128  # problems of each task; a multiple of 16, so that chance is a quarter
ROWS = 8
RIGHT = 0.97
NEAR_CHANCE = 0.25 + 4 * (0.25 * 0.75 / COUNT) ** 0.5  # four standard deviations of guessing


@pytest.fixture(scope="module")
def tasks(tiny_vision: Path, load_tasks: Callable[[Path], ModuleType]) -> ModuleType:
    return load_tasks(tiny_vision)


@pytest.fixture(scope="module")
def runner(tiny_vision_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_vision_artifact, device="cpu") as opened:
        yield opened


def answers(tasks: ModuleType, artifact: Artifact, runner: Runner) -> Callable[[list[tuple[Any, str]]], list[str]]:
    """Answers through the artifact's graphs, a few rows at a time."""
    tokenizer, stop_ids = Tokenizer(artifact.folder), read_stop_ids(artifact.folder)

    def answer(asked: list[tuple[Any, str]]) -> list[str]:
        found = []
        for start in range(0, len(asked), ROWS):
            rows = asked[start : start + ROWS]
            prompts = [tokenizer.encode(text) for _, text in rows]
            images = show_images(artifact, prompts, [[] if picture is None else [picture] for picture, _ in rows])
            result = generate(runner, prompts, tasks.MAX_ANSWER_TOKENS + 1, images=images, stop_ids=stop_ids)
            found += [tokenizer.decode(ids) for ids in result.token_ids]
        return found

    return answer


def test_it_sees(tasks: ModuleType, tiny_vision_artifact: Artifact, runner: Runner) -> None:
    """Held-out questions are answered right with their picture, and by chance with another one or none."""
    answer = answers(tasks, tiny_vision_artifact, runner)
    right, wrong, none = (tasks.score(answer, count=COUNT, images=images) for images in ("right", "wrong", "none"))
    assert len(right) >= 3
    assert all(chance <= 0.25 for chance in tasks.chance(count=COUNT).values())
    assert all(score >= RIGHT for score in right.values()), right
    assert all(score <= NEAR_CHANCE for score in wrong.values()), wrong
    assert all(score <= NEAR_CHANCE for score in none.values()), none


@pytest.mark.parametrize(("precision", "most_lost"), [("int8", 0.01), ("int4", 0.03)])
def test_it_sees_with_quantized_weights(
    precision: str, most_lost: float, tasks: ModuleType, tiny_vision: Path, tmp_path: Path
) -> None:
    """Those of the vision encoder included."""
    export(ExportRequest(checkpoint=tiny_vision, out=tmp_path / "out", precision=precision, verify=False))
    artifact = open_artifact(tmp_path / "out")
    with open_runner(artifact, device="cpu") as runner:
        right = tasks.score(answers(tasks, artifact, runner), count=COUNT, images="right")
    assert all(score >= RIGHT - most_lost for score in right.values()), right


def test_it_sees_every_arrangement_of_tiles(tasks: ModuleType, tiny_vision_artifact: Artifact) -> None:
    """The problems' pictures become 1 to 4 tiles, in all eight arrangements."""
    processor = ImageProcessor.of(tiny_vision_artifact)
    problems = [problem for task in tasks.TASKS for problem in tasks.evaluation_problems(task, count=COUNT)]
    made = [processor.tiles(problem.scene.draw()) for problem in problems]
    assert {len(tiles) for tiles, _ in made} == {1, 2, 3, 4}
    assert {ratio for _, ratio in made} == set(range(1, 9))


def test_several_pictures_in_one_batch(tasks: ModuleType, tiny_vision_artifact: Artifact, runner: Runner) -> None:
    """Each row answers about its own picture, whatever the others have, and as it does alone."""
    tokenizer = Tokenizer(tiny_vision_artifact.folder)
    problems = tasks.evaluation_problems("colour", count=4)
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    prompts.append(tokenizer.encode("how many circles?"))
    pictures = [[problem.scene.draw()] for problem in problems] + [[]]
    together = generate(runner, prompts, 3, images=show_images(tiny_vision_artifact, prompts, pictures)).token_ids
    assert len({tuple(ids) for ids in together}) > 1
    for prompt, of_row, ids in zip(prompts, pictures, together, strict=True):
        images = show_images(tiny_vision_artifact, [prompt], [of_row])
        assert generate(runner, [prompt], 3, images=images).token_ids == [ids]


def test_the_shipped_model_is_small(tiny_vision: Path) -> None:
    """At most 4 MB in all."""
    assert sum(path.stat().st_size for path in tiny_vision.iterdir() if path.is_file()) <= 4_000_000


def test_the_documented_program(tiny_vision_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The Python block of docs/vision.md runs, and prints an answer for each row."""
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "vision.md").read_text(), re.DOTALL)
    exec(block.replace("demo-vision", str(tiny_vision_artifact.folder)), {})
    texts = ast.literal_eval(capsys.readouterr().out)
    assert len(texts) == 2
    assert texts[0].startswith("2")


def test_the_embedding_example(tiny_vision: Path, tiny_vision_artifact: Artifact) -> None:
    """Its program needs nothing of the exporter, nor torch, and answers right."""
    source = (ROOT / "examples" / "embed_vision.py").read_text()
    ours = [line.split()[1].partition(".")[0] for line in source.splitlines() if line.startswith(("from ", "import "))]
    assert set(ours) == {"sys", "numpy", "runtimes"}
    blocked = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; import runpy;"
    for question, expected in (("how many squares?", "2"), ("where is the triangle?", "bottom right")):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"{blocked} runpy.run_path({str(ROOT / 'examples' / 'embed_vision.py')!r}, run_name='__main__')",
                "embed_vision.py",
                str(tiny_vision_artifact.folder),
                f"<|image|>{question}",
                str(tiny_vision / "picture.png"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected
