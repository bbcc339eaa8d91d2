"""The readers, each with how its input is made hostile and how it is read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import onnx
import torch
from PIL import Image

from exporter.bench.engines.onnxruntime_genai import graph_of
from exporter.cli import _print_manifest, _print_signature, _summary
from exporter.clients import CHAT_TEMPLATE, Renaming
from exporter.compare import compare_artifacts
from exporter.genai_config import _special_tokens
from exporter.gguf_tokenizer import rebuild_tokenizer
from exporter.inspection import inspect_checkpoint
from exporter.packaging.triton import _external_files
from exporter.pipeline import read_parity
from exporter.quality import read_tasks
from exporter.source import read_source, small_files
from exporter.text import read_tokens
from graphs.checkpoint import open_checkpoint
from graphs.families import find_family
from runtimes.artifact import GOLDEN_FILE, Manifest, foreign_files, is_artifact, made_by_export, open_artifact
from runtimes.golden import check_golden, load_golden
from runtimes.images import ImageProcessor
from runtimes.onnxruntime_session import OnnxRuntime
from runtimes.prefix_file import load_prefix
from runtimes.runner import open_runner
from runtimes.stopping import read_stop_ids
from runtimes.tokenizer import Tokenizer
from runtimes.torch_package import load_constants, read_facts
from runtimes.widen import expand_float4, load_onnx
from tests.torture.mutations import VALUES, mutate_bytes, mutate_json, mutate_tree, to_text
from tests.torture.odd_files import link_out, put_odd
from tests.torture.seeds import header_of, seal, with_header, write_package

MB = 1 << 20
ODD_SHARE = 0.05  # of cases in which a file is not even a file
HEAD_BYTES = 4096  # of a GGUF file or a graph, in which what matters lies


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One kind of input.

    Attributes:
        make: puts a hostile input into an empty folder, from the folder of valid ones.
        read: reads it as the commands do.
        peak_bytes: more memory than this, beyond what other cases took, is a bug.
        follows: endings of files that are read wherever they lead: those that the user names, and weights.
    """

    make: Callable[[Random, Path, Path], None]
    read: Callable[[Path], object]
    peak_bytes: int = 256 * MB
    follows: tuple[str, ...] = ()


def _copy(seed: Path, case: Path) -> None:
    shutil.copytree(seed, case, dirs_exist_ok=True)


def _change(file: str, mutate: Callable[[Random, bytes], bytes], seed: str, *more: str) -> Any:
    """Makes a case of a seed's folder with one file changed, or one that is odd."""

    def make(rng: Random, seeds: Path, case: Path) -> None:
        _copy(seeds / seed, case)
        path = case / rng.choice((file, *more))
        if rng.random() < ODD_SHARE:
            put_odd(rng, path)
        else:
            path.write_bytes(mutate(rng, path.read_bytes()))

    return make


def _make_config(rng: Random, seeds: Path, case: Path) -> None:
    """Of a whole checkpoint, or of another family without fitting weights."""
    _copy(seeds / "checkpoint", case)
    path = case / "config.json"
    if rng.random() < 0.6:
        shutil.copy(rng.choice(sorted((seeds / "configs").iterdir())), path)
    if rng.random() < ODD_SHARE:
        put_odd(rng, path)
    else:
        path.write_bytes(mutate_json(rng, path.read_bytes()))


def _mutate_safetensors(rng: Random, data: bytes) -> bytes:
    header = header_of(data)
    if rng.random() < 0.5:
        return with_header(data, mutate_json(rng, header))
    return mutate_bytes(rng, data, head=8 + len(header))


def _mutate_own(rng: Random, data: bytes) -> bytes:
    """What the header's metadata says of quantized weights, which is JSON in JSON."""
    header = json.loads(header_of(data))
    key = next(iter(header["__metadata__"]))
    text = mutate_json(rng, header["__metadata__"][key].encode())
    header["__metadata__"][key] = text.decode("utf-8", "replace")
    return with_header(data, to_text(header))


def _make_packed(method: str) -> Any:
    def make(rng: Random, seeds: Path, case: Path) -> None:
        _copy(seeds / method, case)
        config, weights = case / "config.json", case / "model.safetensors"
        if rng.random() < 0.5:
            data = json.loads(config.read_text())
            data["quantization_config"] = mutate_tree(rng, data["quantization_config"])
            config.write_bytes(to_text(data))
        else:
            weights.write_bytes(_mutate_safetensors(rng, weights.read_bytes()))

    return make


def _make_manifest(rng: Random, seeds: Path, case: Path) -> None:
    """Sealed again, so that what it says is looked at; or just damaged."""
    _copy(seeds / "portable", case)
    path = case / "manifest.json"
    if rng.random() < ODD_SHARE:
        put_odd(rng, path)
    elif rng.random() < 0.2:
        path.write_bytes(mutate_json(rng, path.read_bytes()))
    else:
        data = json.loads(path.read_text())
        if rng.random() < 0.3:  # names of files, which lead anywhere
            names = data["files"]
            hostile = rng.choice(
                ("../outside/config.json", "/etc/passwd", "a/../../x", "..", "", "\x00", "x" * 300, "a/b/c")
            )
            names[hostile] = dict(next(iter(names.values())))
        elif rng.random() < 0.1:
            (case / "tokenizer.json").unlink()
            link_out(case / "tokenizer.json")
        else:
            data = mutate_tree(rng, data)
        if isinstance(data, dict):
            seal(case, data)
        else:
            path.write_bytes(to_text(data))


def _reseal(case: Path) -> None:
    seal(case, json.loads((case / "manifest.json").read_text()))


def _make_graph(rng: Random, seeds: Path, case: Path) -> None:
    _copy(seeds / "portable", case)
    path = case / "decoder.onnx"
    if rng.random() < 0.4:
        path.write_bytes(mutate_bytes(rng, path.read_bytes(), head=HEAD_BYTES))
    else:
        model = onnx.load(path, load_external_data=False)
        tensor = rng.choice([each for each in model.graph.initializer if each.external_data])
        entry = rng.choice(tensor.external_data)
        entry.value = str(rng.choice(VALUES)).encode("utf-8", "replace").decode()
        if rng.random() < 0.3:
            tensor.dims[0] = rng.choice((-1, 0, 1, 2**31, 2**62))
        path.write_bytes(model.SerializeToString())
    _reseal(case)


def _make_parity(rng: Random, seeds: Path, case: Path) -> None:
    _change("parity.json", mutate_json, "parity")(rng, seeds, case)
    _reseal(case)


def _make_image(rng: Random, seeds: Path, case: Path) -> None:
    for path in (seeds / "images").glob("*.json"):
        shutil.copy(path, case)
    seed = rng.choice(sorted(path for path in (seeds / "images").iterdir() if path.suffix != ".json"))
    path = case / "picture"
    path.write_bytes(mutate_bytes(rng, seed.read_bytes(), head=rng.choice((64, 256, 4096))))
    kind = rng.random()
    if kind < ODD_SHARE:
        put_odd(rng, path)
    elif kind < 2 * ODD_SHARE:
        path.write_bytes(_BOMBS[rng.randrange(len(_BOMBS))])


def _png(width: int, height: int) -> bytes:
    """A picture whose header claims a size."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    text = b"comment\x00\x00" + zlib.compress(b"\x00" * (80 * MB), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"zTXt", text) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


_BOMBS = (
    _png(100_000, 100_000),
    _png(2**31 - 1, 1),
    _png(1, 2**31 - 1),
    _png(0, 0),
    _png(3, 3),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    b"P6 99999 99999 255\n",
    b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
)


def _make_text(rng: Random, seeds: Path, case: Path) -> None:
    """The user names the text; it may be a pipe, which shells make of a command."""
    _copy(seeds / "text", case)
    path = case / "text.txt"
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def _mutate_lines(rng: Random, data: bytes) -> bytes:
    lines = data.splitlines()
    lines[rng.randrange(len(lines))] = mutate_json(rng, lines[0])
    return b"\n".join(lines)


def _make_prefix(rng: Random, seeds: Path, case: Path) -> None:
    import hashlib

    _copy(seeds / "prefix", case)
    path = case / "saved.prefix"
    data = path.read_bytes()
    kind = rng.random()
    if kind < ODD_SHARE:
        put_odd(rng, path)
    elif kind < 0.4:
        path.write_bytes(mutate_bytes(rng, data, head=8 + len(header_of(data))))
    elif kind < 0.5:
        path.write_bytes(with_header(data, mutate_json(rng, header_of(data))))
    else:  # with the right digest of data that changed
        header = json.loads(header_of(data))
        body = data[8 + len(header_of(data)) :]
        body = mutate_bytes(rng, body) if rng.random() < 0.5 else body
        header["__metadata__"]["sha256"] = hashlib.sha256(body).hexdigest()
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        header[name] = mutate_tree(rng, header[name])
        made = to_text(header)
        path.write_bytes(len(made).to_bytes(8, "little") + made + body)


def _make_package(rng: Random, seeds: Path, case: Path) -> None:
    _copy(seeds / "package", case)
    path = case / "decoder.pt2"
    kind = rng.random()
    if kind < ODD_SHARE:
        put_odd(rng, path)
    elif kind < 0.3:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    else:
        import zipfile

        with zipfile.ZipFile(path) as file:
            (name,) = (each for each in file.namelist() if each.endswith("_metadata.json"))
            metadata = json.loads(file.read(name))
        facts = json.loads(metadata["export_llm"])
        metadata["export_llm"] = to_text(mutate_tree(rng, facts)).decode()
        text = to_text(metadata) if kind < 0.9 else mutate_json(rng, to_text(metadata))
        write_package(
            path, text, rng.choice((None, None, None, "../../outside/x_metadata.json", "/tmp/x_metadata.json"))
        )


def _read_checkpoint(case: Path) -> None:
    """inspect, and every number of every tensor; and what would be copied."""
    facts = inspect_checkpoint(case)
    checkpoint = open_checkpoint(case)
    for tensor in checkpoint.packed.values():
        tensor.dequantize(torch.float32)
    if not facts["refused"]:
        source = read_source(case, None)
        for content in small_files(source).values():
            if isinstance(content, Path):
                content.read_bytes()


def _read_config(case: Path) -> None:
    inspect_checkpoint(case)
    checkpoint = open_checkpoint(case)
    family = find_family(checkpoint.config, checkpoint.shapes)
    family.all_refs(family.parse_config(checkpoint.config))


def _read_generation_config(case: Path) -> None:
    read_stop_ids(case)
    _special_tokens(read_source(case, None))


def _read_tokenizer(case: Path) -> None:
    tokenizer = Tokenizer(case)
    ids = tokenizer.encode("27+58= reverse planet a b c \n\t é 🙂 " + "a" * 64)
    tokenizer.decode(ids[:100])
    tokenizer.decode([0, 5, 99, 10**6])
    tokenizer.vocabulary()


def _read_template(case: Path) -> None:
    """What a client's files are to say: the template's text is put into JSON, and never run."""
    renaming = Renaming(files={}, config={}, template_in="tokenizer_config.json")
    for more in renaming.json_files(case).values():
        json.dumps(more)
    source = read_source(case, None)
    for name, content in small_files(source).items():
        if isinstance(content, Path):
            assert name == content.name
            content.read_bytes()


def _read_preprocessor(case: Path) -> None:
    processor = ImageProcessor(case)
    processor.require_tiles(4, 3, 48)
    processor.batch([[processor.image_token_id, 1]], [[Image.new("RGB", (30, 20))]])


def _read_manifest(case: Path) -> None:
    is_artifact(case)
    made_by_export(case)
    if is_artifact(case):
        foreign_files(case)
    manifest = open_artifact(case).manifest
    json.dumps(_summary(manifest, manifest.parity))
    _print_manifest(manifest, title=str(case))
    _print_signature(manifest)


def _read_graph(case: Path) -> None:
    artifact = open_artifact(case)
    path = artifact.path("decoder.onnx")
    _external_files(path)
    expand_float4(load_onnx(path), case)
    OnnxRuntime("float32", device="cpu", threads=1, log_severity=4).load(path)


def _read_genai(case: Path) -> None:
    graph_of(case)


def _read_parity(case: Path) -> None:
    for each in compare_artifacts([case]):
        json.dumps(each.to_dict())
    read_parity(open_artifact(case))


def _mutate_golden(rng: Random, data: bytes) -> bytes:
    """Bytes of its header; the header as JSON; or what its metadata say."""
    header = header_of(data)
    kind = rng.random()
    if kind < 0.4:
        return mutate_bytes(rng, data, head=8 + len(header))
    if kind < 0.7:
        return with_header(data, mutate_json(rng, header))
    entries = json.loads(header)
    facts = mutate_json(rng, entries["__metadata__"]["golden"].encode())
    entries["__metadata__"]["golden"] = facts.decode(errors="replace")
    return with_header(data, json.dumps(entries).encode())


def _read_golden(case: Path) -> None:
    golden = load_golden(case / GOLDEN_FILE)
    if golden.precision != "float32" or golden.yardsticks.keys() != {"float32"}:
        return
    artifact = open_artifact(case, check_hashes=False)
    check_golden(lambda: open_runner(artifact, device="cpu"), golden, quantized=False)


def _read_gguf(case: Path) -> None:
    checkpoint = open_checkpoint(case / "model.gguf")
    inspect_checkpoint(case / "model.gguf")
    rebuild_tokenizer(case / "model.gguf")
    for tensor in checkpoint.packed.values():
        tensor.dequantize(torch.float32)


def _read_image(case: Path) -> None:
    processor = ImageProcessor(case)
    processor.batch([[processor.image_token_id, 1]], [[case / "picture"]])


def _read_prefix(case: Path) -> None:
    manifest = Manifest.from_json((case / "manifest.json").read_text())
    load_prefix(case / "saved.prefix", manifest)


def _read_text(case: Path) -> None:
    read_tokens(case / "text.txt", Tokenizer(case), 4, 16)


def _read_package(case: Path) -> None:
    facts, _ = read_facts(case / "decoder.pt2")
    load_constants(case, facts, "cpu", {})


READERS: dict[str, Reader] = {
    "config.json": Reader(make=_make_config, read=_read_config),
    "generation_config.json": Reader(
        make=_change("generation_config.json", mutate_json, "checkpoint"), read=_read_generation_config
    ),
    "safetensors": Reader(
        make=_change("model.safetensors", _mutate_safetensors, "checkpoint"),
        read=_read_checkpoint,
        follows=(".safetensors",),
    ),
    "index.json": Reader(
        make=_change("model.safetensors.index.json", mutate_json, "sharded"),
        read=_read_checkpoint,
        follows=(".safetensors",),
    ),
    "tokenizer.json": Reader(make=_change("tokenizer.json", mutate_json, "checkpoint"), read=_read_tokenizer),
    "chat template": Reader(
        make=_change(CHAT_TEMPLATE, mutate_bytes, "checkpoint", "tokenizer_config.json"), read=_read_template
    ),
    "preprocessor_config.json": Reader(
        make=_change("preprocessor_config.json", mutate_json, "images", "config.json"), read=_read_preprocessor
    ),
    "manifest.json": Reader(make=_make_manifest, read=_read_manifest),
    "decoder.onnx": Reader(make=_make_graph, read=_read_graph),
    "genai_config.json": Reader(make=_change("genai_config.json", mutate_json, "genai"), read=_read_genai),
    "parity.json": Reader(make=_make_parity, read=_read_parity),
    "parity.golden": Reader(
        make=_change(GOLDEN_FILE, _mutate_golden, "golden"),
        read=_read_golden,
    ),
    "gguf": Reader(
        follows=(".gguf",),
        make=_change("model.gguf", lambda rng, data: mutate_bytes(rng, data, head=HEAD_BYTES), "gguf"),
        read=_read_gguf,
    ),
    "images": Reader(make=_make_image, read=_read_image, peak_bytes=1024 * MB, follows=("picture",)),
    "prefix": Reader(make=_make_prefix, read=_read_prefix, follows=(".prefix",)),
    "text": Reader(make=_make_text, read=_read_text),
    "tasks.jsonl": Reader(make=_change("tasks.jsonl", _mutate_lines, "text"), read=read_tasks),
    "pt2": Reader(make=_make_package, read=_read_package),
    "gptq": Reader(make=_make_packed("gptq"), read=_read_checkpoint, follows=(".safetensors",)),
    "awq": Reader(make=_make_packed("awq"), read=_read_checkpoint, follows=(".safetensors",)),
    "own quantization": Reader(
        make=_change("model.safetensors", _mutate_own, "own"), read=_read_checkpoint, follows=(".safetensors",)
    ),
}
# The valid inputs of each, which must be accepted: a reader that refuses everything would prove nothing.
SEEDS = {
    "config.json": "checkpoint",
    "generation_config.json": "checkpoint",
    "safetensors": "checkpoint",
    "index.json": "sharded",
    "tokenizer.json": "checkpoint",
    "chat template": "checkpoint",
    "preprocessor_config.json": "images",
    "manifest.json": "portable",
    "decoder.onnx": "portable",
    "genai_config.json": "genai",
    "parity.json": "parity",
    "parity.golden": "golden",
    "gguf": "gguf",
    "images": "images",
    "prefix": "prefix",
    "text": "text",
    "tasks.jsonl": "text",
    "pt2": "package",
    "gptq": "gptq",
    "awq": "awq",
    "own quantization": "own",
}
