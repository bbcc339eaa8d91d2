"""The command with a model that sees: generate --image, inspect, and the messages for what cannot be."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.artifact import Artifact

Image = pytest.importorskip("PIL.Image")
QUESTION = "<|image|>how many squares?"


@pytest.fixture
def picture(tiny_vision: Path) -> Path:
    return tiny_vision / "picture.png"


def test_generate(x_run: Callable[..., Any], tiny_vision_artifact: Artifact, picture: Path) -> None:
    """Text, and JSON with the image token among the prompt's; the wide picture has another answer."""
    folder = tiny_vision_artifact.folder
    ran = x_run("generate", folder, "--image", picture, "--prompt", "<|image|>where is the triangle?")
    assert (ran.code, ran.out) == (0, "bottom right\n"), ran.err
    wide = picture.with_name("wide.png")
    ran = x_run("generate", folder, "--image", wide, "--prompt", "<|image|>where is the triangle?", "--json")
    facts = json.loads(ran.out)
    assert facts["text"] == "bottom left"
    assert facts["prompt_ids"][1] == json.loads((folder / "config.json").read_text())["image_token_index"]
    ran = x_run("generate", folder, "--image", picture, "--prompt", QUESTION, "--num-beams", 3, "--json", "--logprobs")
    assert json.loads(ran.out)["text"] == "2"
    assert json.loads(ran.out)["prompt_logprobs"][:2] == [None, None]


def test_text_alone(x_run: Callable[..., Any], tiny_vision_artifact: Artifact, tmp_path: Path) -> None:
    """The same decoder, without a picture; what pictures need may be absent."""
    folder = Path(shutil.copytree(tiny_vision_artifact.folder, tmp_path / "artifact"))
    manifest = tiny_vision_artifact.manifest
    files = {name: entry for name, entry in manifest.files.items() if name != "preprocessor_config.json"}
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    (folder / "preprocessor_config.json").unlink()
    assert x_run("generate", folder, "--prompt", "how many squares?").code == 0
    ran = x_run("generate", folder, "--prompt", QUESTION, "--image", folder / "x.png")
    ran.refused("holds no preprocessor_config.json, which images need")


def test_pictures_that_cannot_be_shown(
    x_run: Callable[..., Any], tiny_vision_artifact: Artifact, picture: Path, tmp_path: Path
) -> None:
    """One message each, before the model is loaded."""
    folder = tiny_vision_artifact.folder

    def refused(*args: object, prompt: str = QUESTION) -> Callable[..., str]:
        return x_run("generate", folder, "--prompt", prompt, *args).refused

    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:400])
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    refused("--image", text)("row 0, image 0", str(text), "is not an image that Pillow knows")
    refused("--image", cut)("row 0, image 0", str(cut), "cannot be read")
    refused("--image", empty)(str(empty), "is not an image that Pillow knows")
    refused("--image", tmp_path)(str(tmp_path), "Is a directory")
    refused("--image", tmp_path / "none.png")("none.png", "No such file")
    refused()("the prompt holds 1 image token (<|image|>, id", "but no images were given")
    refused("--image", picture, prompt="how many?")("the prompt holds no image tokens", "but 1 image was given")
    refused("--image", picture, "--image", picture)("holds 1 image token", "but 2 images were given")
    five = ["--image", picture] * 5
    refused(*five, prompt="<|image|>" * 5 + "how many squares?")(
        "num_images is 5, but this artifact takes 1 to 4 (set by --max-images, at export)"
    )


def test_a_picture_for_a_model_that_reads_text(
    x_run: Callable[..., Any], x_one_layer_export: Path, picture: Path
) -> None:
    """Named as what it is."""
    ran = x_run("generate", x_one_layer_export, "--prompt", "1+1=", "--image", picture)
    ran.refused("this model reads text only: leave the images out")


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "--max-images must be at least 1 and at most 4096, got 0"), (5000, "at most 4096, got 5000")],
)
def test_max_images(x_run: Callable[..., Any], tiny_vision: Path, tmp_path: Path, value: int, message: str) -> None:
    """Its range."""
    x_run("export", tiny_vision, "-o", tmp_path / "out", "--max-images", value).refused(message)


def test_max_images_of_a_model_that_reads_text(x_run: Callable[..., Any], x_tiny: Path, tmp_path: Path) -> None:
    """An option that would do nothing is refused."""
    ran = x_run("export", x_tiny, "-o", tmp_path / "out", "--max-images", 2)
    ran.refused("--max-images 2: this model (llama) reads text only")


def test_inspect_a_checkpoint(x_run: Callable[..., Any], tiny_vision: Path) -> None:
    """Both parts: layers, tiles, and what a picture costs."""
    facts = json.loads(x_run("inspect", tiny_vision, "--json").out)
    assert facts["model_type"] == "mllama"
    assert facts["layer_kinds"] == "3 causal, 2 cross"
    assert facts["image"] == "up to 4 tiles of 48 x 48 pixels"
    assert facts["vision_tokens_per_tile"] == 17
    # 2 layers, key and value, 2 heads of 16 numbers of 4 bytes, 4 tiles of 17 vision tokens
    assert facts["bytes_per_image_fp32"] == 2 * 2 * 2 * 16 * 4 * 4 * 17
    assert facts["positions"] == "rope llama3, theta 500000"
    assert facts["refused"] == []
    from safetensors import safe_open

    with safe_open(tiny_vision / "model.safetensors", framework="numpy") as file:
        numbers = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert facts["parameters"] == numbers


def test_inspect_an_artifact(x_run: Callable[..., Any], tiny_vision_artifact: Artifact) -> None:
    """Both graphs' inputs and outputs."""
    ran = x_run("inspect", tiny_vision_artifact.folder)
    for expected in ("vision_encoder", "pixel_values", "cross_attention_mask", "cross_key_values.1.key", "4 images"):
        assert expected in ran.out
    facts = json.loads(x_run("inspect", tiny_vision_artifact.folder, "--json").out)
    assert set(facts["graphs"]) == {"decoder", "vision_encoder"}
    assert facts["max_images"] == 4


def test_a_preprocessor_that_does_not_fit(x_run: Callable[..., Any], tiny_vision: Path, tmp_path: Path) -> None:
    """Said at export, where it can be mended; the graphs are good for other programs."""
    folder = Path(shutil.copytree(tiny_vision, tmp_path / "checkpoint"))
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps(preprocessor | {"size": {"height": 32, "width": 32}, "max_image_tiles": 2})
    )
    ran = x_run("export", folder, "-o", tmp_path / "out", "--no-verify", "--quiet")
    assert ran.code == 0
    assert "warning: generate --image will be refused" in ran.err
    assert "up to 2 tiles of 3 colours and 32 pixels, but the vision encoder takes up to 4 of 3 and 48" in ran.err
    ran = x_run("generate", tmp_path / "out", "--prompt", QUESTION, "--image", tiny_vision / "picture.png")
    ran.refused("check size and max_image_tiles in preprocessor_config.json against vision_config in config.json")


def test_weights_in_place(x_run: Callable[..., Any], tiny_vision: Path, tmp_path: Path) -> None:
    """--weights reference writes both graphs beside the checkpoint's files; --force replaces them."""
    folder = Path(shutil.copytree(tiny_vision, tmp_path / "checkpoint"))
    for more in ((), ("--force",)):
        ran = x_run("export", folder, "-o", folder, "--weights", "reference", "--no-verify", "--quiet", *more)
        assert ran.code == 0, ran.err
    ran = x_run("generate", folder, "--image", tiny_vision / "picture.png", "--prompt", QUESTION)
    assert ran.out == "2\n"


def test_verify_against_the_checkpoint(
    x_run: Callable[..., Any], tiny_vision: Path, tiny_vision_artifact: Artifact
) -> None:
    """By the command, with the pictures' rung."""
    ran = x_run("verify", tiny_vision_artifact.folder, "--reference", tiny_vision, "--quiet")
    assert ran.code == 0, ran.err
    assert "keys and values of images" in ran.out
