"""The four tasks the tiny Llama Vision knows: pictures, questions about them, held-out problems and a scorer.

    colour    what colour is the circle?   red
    shape     which shape is blue?         triangle
    count     how many crosses?            3
    position  where is the square?         bottom left

A question ends in "?"; its completion is the answer alone, after which the model must emit </s>. Each question has
four answers, all equally likely until one looks at the picture.
A hash of the picture's layout decides whether it is held out, so training and evaluation are disjoint by construction.
Only Pillow and the standard library are used here: a test of an exported graph can score it without torch.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from PIL import Image, ImageDraw

TILE_PIXELS = 48  # the side of a tile; train.py writes the same number into preprocessor_config.json
TILE_ROWS_COLUMNS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # each as likely as the others
COLOURS = {"red": (220, 40, 40), "green": (40, 165, 70), "blue": (50, 80, 215), "yellow": (240, 200, 40)}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
SHAPES = tuple(PLURALS)
IMAGE_TOKEN = "<|image|>"

ANSWERS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "count": ("0", "1", "2", "3"),
    "position": ("top left", "top right", "bottom left", "bottom right"),
}
QUESTIONS = {
    "colour": tuple(f"what colour is the {shape}?" for shape in SHAPES),
    "shape": tuple(f"which shape is {colour}?" for colour in COLOURS),
    "count": tuple(f"how many {plural}?" for plural in PLURALS.values()),
    "position": tuple(f"where is the {shape}?" for shape in SHAPES),
}
TASKS = tuple(ANSWERS)
MAX_ANSWER_TOKENS = 2  # "bottom left"; all others are one
MIN_THINGS, MAX_THINGS = 4, 6  # a picture of one tile has room for four
SMOOTHING = 4  # pictures are drawn this much larger and then reduced
MAX_PROBLEMS = 400  # held-out problems per task: 25 for each question and answer
HELD_OUT_ONE_IN = 10
EVALUATION_SEED = 20240

Images = Literal["right", "wrong", "none"]
AnswerFn = Callable[[list[tuple[Image.Image | None, str]]], list[str]]


@dataclass(frozen=True)
class Thing:
    """One coloured shape: the cell of the picture's grid that it lies in, and its box and colour as drawn."""

    shape: str
    colour: str
    row: int
    column: int
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and what can be asked about it: one question of each task."""

    width: int
    height: int
    rows: int  # of cells: two to a tile in both directions
    columns: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    lone_shape: str  # the picture has exactly one thing of this shape,
    lone_colour: str  # exactly one of this colour,
    counted_shape: str  # and from none to three of this shape

    @property
    def key(self) -> str:
        """Which shape in which colour is where; sizes, shades and the exact places are left out."""
        things = (f"{thing.row},{thing.column} {thing.colour} {thing.shape}" for thing in self.things)
        return f"{self.rows}x{self.columns}: {'; '.join(sorted(things))}"

    @property
    def held_out(self) -> bool:
        """True for about one layout in HELD_OUT_ONE_IN, the same ones on every machine and Python version."""
        digest = hashlib.sha256(self.key.encode("ascii")).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0

    def draw(self) -> Image.Image:
        """Return the picture, RGB."""
        size = (self.width * SMOOTHING, self.height * SMOOTHING)
        picture = Image.new("RGB", size, self.background)
        pen = ImageDraw.Draw(picture)
        for thing in self.things:
            left, top, right, bottom = (round(edge * SMOOTHING) for edge in thing.box)
            third = (right - left) // 3
            if thing.shape == "circle":
                pen.ellipse((left, top, right, bottom), fill=thing.rgb)
            elif thing.shape == "square":
                pen.rectangle((left, top, right, bottom), fill=thing.rgb)
            elif thing.shape == "triangle":
                pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=thing.rgb)
            else:
                assert thing.shape == "cross", thing.shape
                pen.rectangle((left + third, top, right - third, bottom), fill=thing.rgb)
                pen.rectangle((left, top + third, right, bottom - third), fill=thing.rgb)
        return picture.reduce(SMOOTHING)

    def problem(self, task: str) -> "Problem":
        """Return the task's question about this picture, with its answer."""
        loner = next(thing for thing in self.things if thing.shape == self.lone_shape)
        if task == "colour":
            return Problem(self, f"what colour is the {loner.shape}?", loner.colour)
        if task == "shape":
            shape = next(thing.shape for thing in self.things if thing.colour == self.lone_colour)
            return Problem(self, f"which shape is {self.lone_colour}?", shape)
        if task == "count":
            count = sum(thing.shape == self.counted_shape for thing in self.things)
            return Problem(self, f"how many {PLURALS[self.counted_shape]}?", str(count))
        assert task == "position", task
        vertical = "top" if loner.row < self.rows // 2 else "bottom"
        horizontal = "left" if loner.column < self.columns // 2 else "right"
        return Problem(self, f"where is the {loner.shape}?", f"{vertical} {horizontal}")


@dataclass(frozen=True)
class Problem:
    """A picture, a question about it and the only right answer."""

    scene: Scene
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The question as it is asked about a picture: with the image token in front."""
        return IMAGE_TOKEN + self.question


def _below(rng: random.Random, limit: int) -> int:
    # Only random() is promised to give the same sequence in later Python versions; randrange and choices are not.
    return int(rng.random() * limit)


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _shuffled(rng: random.Random, values: list) -> list:
    return sorted(values, key=lambda _: rng.random())


def _shade(rng: random.Random, rgb: tuple[int, int, int], spread: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel - spread + _below(rng, 2 * spread + 1))) for channel in rgb)
    return red, green, blue


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene whose questions say nothing about their answers: no shape, colour, number or place is favoured."""
    tile_rows, tile_columns = TILE_ROWS_COLUMNS[_below(rng, len(TILE_ROWS_COLUMNS))]
    # Up to a quarter of a tile short of whole tiles: the image processor pads, enlarges or does both.
    width = tile_columns * TILE_PIXELS - _below(rng, TILE_PIXELS // 4)
    height = tile_rows * TILE_PIXELS - _below(rng, TILE_PIXELS // 4)
    rows, columns = 2 * tile_rows, 2 * tile_columns

    # However many are counted, there are as many things in all: their number must not give the count away.
    counted_shape, lone_shape, *others = _shuffled(rng, list(SHAPES))
    things = MIN_THINGS + _below(rng, min(MAX_THINGS, rows * columns) - MIN_THINGS + 1)
    counted = _below(rng, 4)
    shapes = [counted_shape] * counted + [lone_shape] + [others[_below(rng, 2)] for _ in range(things - 1 - counted)]
    lone_colour, *colours = _shuffled(rng, list(COLOURS))
    colours = [lone_colour] + [colours[_below(rng, 3)] for _ in range(things - 1)]
    cells = _shuffled(rng, [(row, column) for row in range(rows) for column in range(columns)])

    placed = []
    for shape, colour, (row, column) in zip(_shuffled(rng, shapes), colours, cells, strict=False):
        cell_width, cell_height = width / columns, height / rows
        side = _between(rng, 0.75, 0.95) * min(cell_width, cell_height)
        left = cell_width * column + _between(rng, 0, cell_width - side)
        top = cell_height * row + _between(rng, 0, cell_height - side)
        box = (left, top, left + side, top + side)
        placed.append(Thing(shape, colour, row, column, box, _shade(rng, COLOURS[colour], 15)))
    return Scene(
        width=width,
        height=height,
        rows=rows,
        columns=columns,
        background=_shade(rng, (235, 235, 235), 20),
        things=tuple(placed),
        lone_shape=lone_shape,
        lone_colour=lone_colour,
        counted_shape=counted_shape,
    )


def training_scenes(*, seed: int) -> Iterator[Scene]:
    """Yield scenes without end, never a held-out one."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng)
        if not scene.held_out:
            yield scene


@cache
def _all_evaluation_problems(task: str) -> tuple[Problem, ...]:
    kinds = [(question, answer) for question in QUESTIONS[task] for answer in ANSWERS[task]]
    rounds = MAX_PROBLEMS // len(kinds)
    rng = random.Random(EVALUATION_SEED + TASKS.index(task))
    found: dict[tuple[str, str], dict[str, Problem]] = defaultdict(dict)  # by kind, by key
    while any(len(found[kind]) < rounds for kind in kinds):
        scene = random_scene(rng)
        problem = scene.problem(task)
        if scene.held_out and len(found[problem.question, problem.answer]) < rounds:
            found[problem.question, problem.answer].setdefault(scene.key, problem)
    by_kind = [list(found[kind].values()) for kind in kinds]
    return tuple(problem for one_each in zip(*by_kind, strict=True) for problem in _shuffled(rng, list(one_each)))


def evaluation_problems(task: str, *, count: int = MAX_PROBLEMS) -> list[Problem]:
    """Return the first `count` of the task's fixed list of held-out problems, no two with the same layout.

    Every 16 in a row ask each question once for each of its answers.
    """
    if not 1 <= count <= MAX_PROBLEMS:
        raise ValueError(f"count must be from 1 to {MAX_PROBLEMS}, got {count}")
    return list(_all_evaluation_problems(task)[:count])


def chance(*, count: int = MAX_PROBLEMS) -> dict[str, float]:
    """Return the share of each task's problems that the best guesser gets right who sees the question alone.

    It is exactly a quarter where `count` is a multiple of 16; the guesser knows the answers and is lucky elsewhere.
    """
    best = {}
    for task in TASKS:
        answers: dict[str, Counter[str]] = defaultdict(Counter)  # by question
        for problem in evaluation_problems(task, count=count):
            answers[problem.question][problem.answer] += 1
        best[task] = sum(max(counts.values()) for counts in answers.values()) / count
    return best


def score(answer_fn: AnswerFn, *, count: int = MAX_PROBLEMS, images: Images = "right") -> dict[str, float]:
    """Return each task's share (0 to 1) of held-out problems whose completion equals the answer exactly.

    `answer_fn` is called once per task with `count` pairs of picture and prompt; it returns the completions in the
    same order, as text without special tokens. Let it make MAX_ANSWER_TOKENS + 1 tokens: an answer that does not stop
    is then a wrong one. With images="wrong" each question comes with the picture of another problem, half the list
    away and drawn independently of it; with "none" the picture is None and the prompt has no image token.

    Raises:
        ValueError: `images` is none of the three, or the number of completions is not the number of prompts.
    """
    if images not in ("right", "wrong", "none"):
        raise ValueError(f'images must be "right", "wrong" or "none", got {images!r}')
    accuracy = {}
    for task in TASKS:
        problems = evaluation_problems(task, count=count)
        if images == "none":
            asked = [(None, problem.question) for problem in problems]
        else:
            everything = _all_evaluation_problems(task)
            shift = MAX_PROBLEMS // 2 if images == "wrong" else 0
            pictured = [everything[(i + shift) % MAX_PROBLEMS].scene for i in range(count)]
            asked = [(scene.draw(), problem.prompt) for scene, problem in zip(pictured, problems, strict=True)]
        completions = answer_fn(asked)
        if len(completions) != len(problems):
            raise ValueError(f"{task}: expected {len(problems)} completions, got {len(completions)}")
        right = sum(text == problem.answer for text, problem in zip(completions, problems, strict=True))
        accuracy[task] = right / len(problems)
    return accuracy
