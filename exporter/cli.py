"""The `export-llm` command. Heavy imports are inside the commands, so that --help answers at once."""

import atexit
import gc
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from exporter.errors import ExportError
from graphs.errors import CheckpointError
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError, legible

if TYPE_CHECKING:
    from runtimes.artifact import Artifact, Manifest
    from runtimes.parity import ParitySummary
    from runtimes.quality import QualityReport
    from runtimes.runner import Runner

EXIT_PARITY_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_BUG = 70  # sysexits.h: EX_SOFTWARE
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as of a program that does not catch it
EXIT_TERMINATED = 143

# Tracing makes millions of small objects and few cycles: a sixth of its time would go into looking for those.
GC_THRESHOLDS = (50_000, 20, 100)
# Python's last collection would go through all that torch holds, for a third of a second, and then end.
atexit.register(gc.freeze)

DEFAULT_ARCHS = {"torch": "processors like the one it was compiled on"}  # by target: of engines that name no GPU

FOLDER = click.Path(path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
_quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
_runtime_option = click.option(
    "--runtime",
    default="onnxruntime",
    show_default=True,
    help="onnxruntime, tensorrt, tensorrt-rtx, aoti, or PyTorch itself: eager, compiled.",
)
_device_option = click.option("--device", help="cpu or cuda; not for tensorrt.  [default: cuda where it can be used]")


_report_option = click.option(
    "--report",
    "reports",
    type=FOLDER,
    multiple=True,
    metavar="FILE",
    help="Verdict to write: JUnit .xml, .md or .json; may be repeated.",
)


EXPORT_OPTIONS = (
    click.option(
        "--target",
        "targets",
        multiple=True,
        default=("onnx",),
        help="onnx (always made), tensorrt-rtx, tensorrt, torch; may be repeated.",
    ),
    click.option(
        "--layout",
        default="portable",
        show_default=True,
        help="How the ONNX graph carries its cache: portable, dynamic (Optimum, transformers.js) or genai.",
    ),
    click.option("--client", help="Give files the names that this client looks for: transformers-js."),
    click.option(
        "--precision",
        help="fp32, fp16, bf16, int8, int4, fp8 or nvfp4; also such as int4:block=64,lm_head=int8,embed=fp16."
        "  [default: as the checkpoint is stored]",
    ),
    click.option("--quantizer", default="rtn", show_default=True, help="rtn, mse, gptq or awq."),
    click.option(
        "--calibration",
        type=FOLDER,
        help="Text for gptq and awq to be calibrated on.  [default: sampled from the model]",
    ),
    click.option("--eval-text", type=FOLDER, help="Text to measure the quality on.  [default: sampled from the model]"),
    click.option("--requantize", is_flag=True, help="Allow weights that are quantized already to be rounded again."),
    click.option(
        "--max-len",
        type=int,
        help="Tokens the cache holds, prompt included.  [default: max_position_embeddings, at most 4096]",
    ),
    click.option("--max-batch", type=int, default=8, show_default=True, help="Most rows of a batch."),
    click.option("--max-images", type=int, help="Most images of a prompt, for models that see.  [default: 4]"),
    click.option(
        "--weights",
        default="copy",
        show_default=True,
        help="copy, or reference: write the graph beside the checkpoint's own files.",
    ),
    click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with eager PyTorch."),
    click.option("--gpu-arch", "gpu_archs", multiple=True, help="For tensorrt-rtx, such as 89; may be repeated."),
    click.option("--allow-nonfinite", is_flag=True, help="Export weights that hold NaN or infinity."),
    click.option("--force", is_flag=True, help="Replace an artifact that is already there."),
)


def _export_options(command: Any) -> Any:
    """Give a command what decides on an export, but for where it is to be."""
    for option in reversed(EXPORT_OPTIONS):
        command = option(command)
    return click.argument("checkpoint", type=FOLDER)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="export-llm")
def cli() -> None:
    """Export Llama-family checkpoints to ONNX and TensorRT, and prove each artifact against eager PyTorch."""


@cli.command()
@_export_options
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder to make.")
@click.option("--dry-run", is_flag=True, help="Write nothing: say what would be written, needed and refused.")
@_report_option
@_json_option
@_quiet_option
def export(
    checkpoint: Path,
    out: Path,
    dry_run: bool,
    reports: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Export CHECKPOINT (a Hugging Face folder with safetensors, or a GGUF file) to an artifact folder.

    The same export to the same OUT goes on where it was interrupted; where it is done already, nothing is done.
    """
    if dry_run:
        _plan(checkpoint, out, as_json, options)
        return
    from exporter.pipeline import ExportRequest
    from exporter.pipeline import export as run_export
    from exporter.reports import check_reports, write_reports

    check_reports(reports)
    start = time.perf_counter()
    request = ExportRequest(checkpoint=checkpoint, out=out, **options)
    with _progress(quiet) as progress:
        result = run_export(request, progress)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    if result.unchanged:
        click.echo(f"{out} is this very export already, and whole: nothing was done (--force does it again)", err=True)
    if result.taken_over:
        click.echo(f"taken over from an export that was stopped: {', '.join(result.taken_over)}", err=True)
    manifest = result.manifest
    if result.parity is not None:
        write_reports(result.parity, str(out), reports)
    if as_json:
        parity = None if result.parity is None else result.parity.to_dict()
        seconds = round(time.perf_counter() - start, 2)
        facts = {"out": str(out), "seconds": seconds, "unchanged": result.unchanged, "taken_over": result.taken_over}
        _print_json(facts | _summary(manifest, parity))
    else:
        _print_manifest(manifest, title=str(out))
        if result.parity is not None:
            click.echo()
            _print_parity(result.parity)
    if result.parity is not None and not result.parity.passed:
        sys.exit(EXIT_PARITY_FAILED)


@cli.command()
@_export_options
@click.option("-o", "--out", type=FOLDER, help="Folder that export would make.  [default: not looked at]")
@_json_option
def plan(checkpoint: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Say what export would write, need and refuse, without reading a weight; exit 2 where it would be refused."""
    _plan(checkpoint, out, as_json, options)


def _plan(checkpoint: Path, out: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    with _no_collection():
        from exporter.pipeline import ExportRequest
        from exporter.plan import make_plan
        from exporter.plan_report import plan_facts, plan_to_dict, refusal

        request = ExportRequest(checkpoint=checkpoint, out=out or checkpoint, **options)
        made = make_plan(request, checks_out=out is not None)
    if as_json:
        _print_json(plan_to_dict(made))
    elif facts := plan_facts(made):
        _print_facts(dict(facts), title=f"plan of {checkpoint}" + ("" if out is None else f" to {out}"))
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    if made.problems:
        raise ExportError(refusal(made))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Look for no garbage meanwhile: importing torch makes none, and would be a quarter slower."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@cli.command()
@click.argument("artifact", type=FOLDER)
@click.option("--reference", type=FOLDER, help="Checkpoint to compare with.  [default: the artifact's own weights]")
@click.option(
    "--golden",
    is_flag=True,
    help="Compare with the answers that the export recorded.  [default: where PyTorch is not installed]",
)
@_runtime_option
@_device_option
@_report_option
@_json_option
@_quiet_option
def verify(
    artifact: Path,
    reference: Path | None,
    golden: bool,
    runtime: str,
    device: str | None,
    reports: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Check every file's hash, then compare ARTIFACT with eager PyTorch; exit 1 when it differs.

    With --golden, or where PyTorch is not installed, with the answers that eager PyTorch gave when it was exported.
    """
    from exporter.reports import check_reports, write_reports
    from runtimes.artifact import open_artifact
    from runtimes.verification import artifact_targets, verify_golden

    check_reports(reports)
    if golden and reference is not None:
        raise FeedError("--golden compares with what was recorded, and not with a --reference: leave one of them out")
    golden = golden or (reference is None and not _is_installed("torch"))
    with _progress(quiet) as progress:
        progress.start("check hashes")
        opened = open_artifact(artifact)
        if runtime == "onnxruntime":
            targets = artifact_targets(opened, device)
        else:
            targets = {runtime: lambda: _open_runner(opened, runtime, device)}
        if golden:
            summary = verify_golden(opened, targets, progress.start)
        else:
            from exporter.verify import verify_artifact

            summary = verify_artifact(opened, targets, reference, progress)
    write_reports(summary, str(artifact), reports)
    if as_json:
        _print_json(summary.to_dict())
    else:
        _print_parity(summary)
    if not summary.passed:
        sys.exit(EXIT_PARITY_FAILED)


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@cli.command()
@click.argument("artifact", type=FOLDER)
@click.option(
    "--against",
    type=FOLDER,
    metavar="CHECKPOINT|ARTIFACT",
    help="What to compare with: a checkpoint's weights, or another artifact's graph.  [default: its own weights]",
)
@click.option("--runtime", default="onnxruntime", show_default=True, help="onnxruntime, tensorrt or tensorrt-rtx.")
@_device_option
@click.option("--html", "page", type=FOLDER, metavar="FILE", help="Page to write: every operator, and a picture.")
@_json_option
@_quiet_option
def diff(artifact: Path, page: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Find the first operator of ARTIFACT that leaves eager PyTorch; exit 1 when there is one."""
    from exporter.diff.page import check_page, write_page
    from exporter.diff.run import diff_artifact
    from exporter.diff.tables import COLUMNS, depth_rows
    from runtimes.artifact import open_artifact

    check_page(page)
    with _progress(quiet) as progress:
        progress.start("check hashes")
        report = diff_artifact(open_artifact(artifact), progress=progress, **options)
    if page is not None:
        write_page(report, page)
    if as_json:
        _print_json(report.to_dict())
    else:
        for comparison in report.comparisons:
            table = _table(*COLUMNS, title=comparison.runtime)
            for row in depth_rows(comparison):
                table.add_row(*row)
            _print_table(table)
            click.echo(f"reference: {comparison.reference}")
            click.echo(comparison.sentence())
    if not report.passed:
        sys.exit(EXIT_PARITY_FAILED)


@cli.command()
@click.argument("artifact", type=FOLDER)
@click.option("--prompt", required=True, help="Text to continue; <|image|> in it stands for an image.")
@click.option(
    "--image", "images", type=FOLDER, multiple=True, help="Picture for the prompt's next <|image|>; may be repeated."
)
@click.option("--max-new-tokens", type=int, help="[default: until a stop id, or the cache is full]")
@click.option("--temperature", type=float, help="Above 0, tokens are drawn by chance.  [default: 0, greedy]")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens only.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the fewest tokens that are P likely together only.")
@click.option(
    "--min-p", type=float, metavar="P", help="Draw from tokens at least P times as likely as the likeliest only."
)
@click.option("--repetition-penalty", type=float, help="Above 1, tokens that were there before become less likely.")
@click.option("--seed", type=int, help="The same seed draws the same tokens.  [default: 0]")
@click.option("--num-beams", type=int, default=1, show_default=True, help="Above 1: beam search of that width.")
@click.option("--length-penalty", type=float, help="Beam search: above 0 favours long texts.  [default: 1]")
@click.option("--stop", "stop_strings", multiple=True, help="End before this text; may be repeated.")
@click.option("--logprobs", is_flag=True, help="With --json: the log-probability of each prompt and output token.")
@click.option("--save-prefix", type=FOLDER, metavar="FILE", help="Keep what the prompt leaves in the cache.")
@click.option(
    "--prefix", type=FOLDER, metavar="FILE", help="Start from such a file: the prompt begins with what it was saved of."
)
@click.option(
    "--prefill-chunk", type=int, metavar="N", help="Feed the prompt N tokens at a time: long ones need less memory."
)
@click.option("--draft", type=FOLDER, metavar="ARTIFACT", help="Smaller model that proposes tokens; the text stays.")
@click.option("--draft-tokens", type=int, metavar="K", help="Tokens that the draft proposes at a time.  [default: 4]")
@_runtime_option
@_device_option
@_json_option
def generate(runtime: str, device: str | None, as_json: bool, **options: Any) -> None:
    """Continue a prompt with ARTIFACT: greedily, by chance (--temperature) or by beam search (--num-beams)."""
    from exporter.generate_command import SAMPLING_OPTIONS, GenerateRequest, describe_draft, open_all

    given = {name: options.pop(name) for name in SAMPLING_OPTIONS}
    sampling = {name: value for name, value in given.items() if value is not None}
    request = GenerateRequest(sampling=sampling, as_json=as_json, **options)
    with _progress(quiet=not sys.stderr.isatty()) as progress:
        opened = open_all(request, lambda artifact: _open_runner(artifact, runtime, device), progress)
    with opened:
        facts = opened.run(None if as_json else lambda text: click.echo(text, nl=False))
    if as_json:
        _print_json(facts)
        return
    click.echo()
    if "draft" in facts:
        click.echo(describe_draft(facts), err=True)


@cli.command()
@click.argument("artifacts", metavar="ARTIFACT...", type=FOLDER, nargs=-1, required=True)
@click.option("-o", "--out", type=FOLDER, help="Picture of quality against bytes per weight to write, such as c.png.")
@_json_option
def compare(artifacts: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put the quality of artifacts of one model side by side: what precision and quantizer cost."""
    from exporter.compare import compare_artifacts, draw

    compared = compare_artifacts(artifacts)
    if out is not None:
        draw(compared, out)
    if as_json:
        _print_json([each.to_dict() for each in compared])
        return
    tasks = list(dict.fromkeys(task for each in compared if each.quality for task in each.quality.tasks))
    columns = ("artifact", "precision", "quantizer", "weights", "bytes each", "mean KL", "99.9 % KL", "same best")
    table = _table(*columns, "perplexity", *tasks, "parity")
    for each in compared:
        row = [each.name, each.precision, each.quantizer, f"{each.weight_bytes / 1e6:,.1f} MB"]
        row.append("" if each.bytes_per_weight is None else f"{each.bytes_per_weight:.3f}")
        if (quality := each.quality) is None:
            row += ["nothing was rounded", *[""] * (3 + len(tasks))]
        else:
            row += [f"{quality.kl_mean:.3g}", f"{quality.kl_p999:.3g}", f"{100 * quality.top1_agreement:.1f} %"]
            row.append(f"{quality.perplexity_stored:.4g} ({quality.perplexity_difference:+.2g})")
            scores = (quality.tasks.get(task) for task in tasks)
            row += ["" if score is None else f"{100 * score.stored:.1f} %" for score in scores]
        table.add_row(*row, "passed" if each.passed else "FAILED")
    _print_table(table)


@cli.command()
@click.argument("artifact", type=FOLDER)
@click.option("--format", "package_format", default="triton", show_default=True, help="triton: a model repository.")
@click.option("-o", "--out", type=FOLDER, required=True, help="Repository to add the model to; may be new.")
@click.option("--name", help="What the model is called there.  [default: the artifact's folder]")
@click.option("--runtime", default="onnxruntime", show_default=True, help="onnxruntime or tensorrt, in the server.")
@_device_option
@click.option("--threads", type=int, help="Threads for one operator, on the CPU.  [default: one for each core]")
@click.option("--max-sequences", type=int, help="Texts in work at a time, each with a cache.  [default: --max-batch]")
@click.option(
    "--idle-timeout",
    "idle_timeout_s",
    type=float,
    default=60,
    show_default=True,
    help="Seconds after which the server forgets a text whose client is silent.",
)
@click.option("--force", is_flag=True, help="Replace a model of that name.")
@_json_option
@_quiet_option
def package(package_format: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write ARTIFACT as an inference server wants it: a model repository for Triton."""
    from exporter.packaging import FORMATS
    from exporter.packaging.request import PackageRequest

    if package_format not in FORMATS:
        raise ExportError(f"unknown --format {package_format!r}; known: {', '.join(FORMATS)}")
    request = PackageRequest(**options)
    with _progress(quiet) as progress:
        made = FORMATS[package_format](request, progress)
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        models = [{"name": each.name, "files": each.files, "states": each.states} for each in made.models]
        _print_json({"repository": str(request.out), "models": models, "warnings": made.warnings})
        return
    for each in made.models:
        kept = f"{each.states} tensors, zero at first" if each.states else "nothing"
        sizes = {name: f"{size:,} bytes" for name, size in each.files.items()}
        _print_facts({"kept by the server": kept, **sizes}, title=str(each.folder))


@cli.command()
@click.argument("artifact", type=FOLDER)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    default=("onnxruntime",),
    help="What runs ARTIFACT; may be repeated. onnxruntime-genai runs artifacts of the layout genai.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="PEER|FOLDER[@RUNTIME]",
    help="onnxruntime-genai, transformers, torch.compile, llama-cpp-python, `all` that are there, or another artifact;"
    " may be repeated.",
)
@click.option("--checkpoint", type=FOLDER, help="What peers make their models of.  [default: an unrounded artifact's]")
@click.option("--prompt-tokens", metavar="N,..", help="Prompt lengths.  [default: 128,512,2048, as far as they fit]")
@click.option("--new-tokens", type=int, default=64, show_default=True, help="Tokens that are generated in each run.")
@click.option("--batch-size", type=int, default=1, show_default=True)
@click.option("--repeats", type=int, default=5, show_default=True, help="Runs of each contestant, in turn.")
@click.option("--threads", type=int, help="[default: as many as there are cores]")
@click.option(
    "--peer-python",
    "peer_pythons",
    multiple=True,
    metavar="[PEER=]PYTHON",
    envvar="EXPORT_LLM_PEER_PYTHON",
    help="Interpreter that runs a peer, or all of them; may be repeated.  [default: this one]",
)
@click.option("-o", "--out", "outs", type=FOLDER, multiple=True, help="Picture, or .json file; may be repeated.")
@_json_option
@_quiet_option
def bench(
    artifact: Path,
    runtimes: tuple[str, ...],
    against: tuple[str, ...],
    checkpoint: Path | None,
    prompt_tokens: str | None,
    peer_pythons: tuple[str, ...],
    outs: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
    **numbers: Any,
) -> None:
    """Measure how fast ARTIFACT loads, prefills and decodes on this machine's CPU, beside other runtimes."""
    from exporter.bench.options import read_lengths, read_pythons
    from exporter.bench.plan import make_plan
    from exporter.bench.run import BenchRequest
    from exporter.bench.run import bench as run_bench
    from exporter.bench.tables import tables
    from exporter.bench.written import check_writable, write
    from runtimes.artifact import open_artifact

    check_writable(outs)
    with _progress(quiet) as progress:
        progress.start("check hashes")
        opened = open_artifact(artifact)
        manifest = opened.manifest
        lengths = read_lengths(prompt_tokens)
        request = BenchRequest(
            artifact=opened,
            plan=make_plan(
                max_len=manifest.cache.max_len, max_batch=manifest.max_batch, prompt_tokens=lengths, **numbers
            ),
            runtimes=runtimes,
            against=against,
            checkpoint=checkpoint,
            pythons=read_pythons(peer_pythons),
        )
        report = run_bench(request, progress)
    for out in outs:
        write(report, out)
    if as_json:
        _print_json(report.to_dict())
        return
    for title, (columns, *rows) in tables(report).items():
        table = _table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        _print_table(table)
    for peer, reason in report.not_run.items():
        click.echo(f"not run: {peer}: {reason}")


@cli.command()
@click.argument("path", metavar="[CHECKPOINT_OR_ARTIFACT]", type=FOLDER, required=False)
@_json_option
def inspect(path: Path | None, as_json: bool) -> None:
    """Describe a checkpoint (what would be exported, or is refused) or an artifact (what it holds).

    Without a path: list the model families, attention variants and whatever else export knows.
    """
    from runtimes.artifact import MANIFEST

    if path is None:
        _print_known(as_json)
        return
    if (path / MANIFEST).is_file():
        from runtimes.artifact import open_artifact

        manifest = open_artifact(path).manifest
        if as_json:
            _print_json(_summary(manifest, manifest.parity))
        else:
            _print_manifest(manifest, title=str(path))
            click.echo()
            _print_signature(manifest)
        return
    from exporter.inspection import inspect_checkpoint

    facts = inspect_checkpoint(path)
    if as_json:
        _print_json(facts)
    else:
        shown = facts | {"refused": "\n".join(facts["refused"]) or "nothing"}
        _print_facts({key.replace("_", " "): value for key, value in shown.items()}, title=str(path))
    if facts["refused"]:
        raise ExportError(f"export refuses {path}: {facts['refused'][0].splitlines()[0]}")


def main() -> None:
    """Entry point: run the command; a user's mistake becomes one message and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except SystemExit:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # click's answer to a closed pipe, with exit code 1
            sys.exit(EXIT_BROKEN_PIPE)
        raise
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_WRONG_INPUT)
    except (KeyboardInterrupt, click.Abort) as error:
        click.echo("interrupted" + _notes(error.__context__ or error), err=True)  # click wraps what it interrupts
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        click.echo(f"error: {_os_error(error)}", err=True)
        sys.exit(EXIT_WRONG_INPUT)
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        click.echo(f"error: out of memory{detail}: try a smaller --max-len, or --no-verify", err=True)
        sys.exit(EXIT_WRONG_INPUT)
    except Exception as error:
        if _is_users(error):
            click.echo(f"error: {error}", err=True)
            sys.exit(EXIT_WRONG_INPUT)
        traceback.print_exc()
        click.echo("this is a bug in export-llm; please report it with the lines above", err=True)
        sys.exit(EXIT_BUG)


def _is_users(error: Exception) -> bool:
    """True for the exceptions whose message is meant for the user."""
    return isinstance(error, ArtifactError | CheckpointError | ExportError | FeedError | RuntimeMissingError)


def _os_error(error: OSError) -> str:
    import errno

    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}the disk is full ({error.strerror}){_notes(error)}; free some space and try again"
    return f"{where}{error.strerror or error}{_notes(error)}"


def _notes(error: BaseException) -> str:
    """What was noted on the error on its way, such as that nothing was left behind."""
    return "".join(f": {note}" for note in getattr(error, "__notes__", ()))


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(EXIT_TERMINATED)  # an exception, so that unfinished files are removed


def _open_runner(artifact: "Artifact", runtime: str, device: str | None) -> "Runner":
    from runtimes.runner import RUNNERS, open_runner
    from runtimes.tensorrt_api import FLAVORS

    if device and runtime in FLAVORS:
        raise FeedError(f"--device is not for {runtime}, which runs on the GPU")
    if runtime in RUNNERS:
        return open_runner(artifact, runtime, **({"device": device} if device else {}))
    from exporter.torch_runners import MODULE_RUNNERS

    if runtime not in MODULE_RUNNERS:
        raise RuntimeMissingError(f"unknown runtime {runtime!r}; known: {', '.join((*RUNNERS, *MODULE_RUNNERS))}")
    return MODULE_RUNNERS[runtime](artifact, device)


def _progress(quiet: bool) -> Any:
    from rich.console import Console

    from exporter.progress import make_progress

    return make_progress(Console(stderr=True), quiet)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1))


def _summary(manifest: "Manifest", parity: Any) -> dict[str, Any]:
    """What --json prints of an artifact."""
    return {
        "model_type": manifest.config["model_type"],
        "layout": manifest.layout,
        "precision": manifest.precision,
        "max_len": manifest.cache.max_len,
        "quantization": manifest.quantization,
        "max_batch": manifest.max_batch,
        "cache_bytes_per_token": manifest.cache.bytes_per_token,
        **_vision_summary(manifest),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "engines": {
            name: {"file": engine.file, "library_version": engine.library_version, "gpu_archs": engine.gpu_archs}
            for name, engine in manifest.engines.items()
        },
        "graphs": {name: graph.signature.to_json() for name, graph in manifest.graphs.items()},
        "parity": parity,
        "tools": dict(manifest.tools),
    }


def _vision_summary(manifest: "Manifest") -> dict[str, Any]:
    vision = manifest.vision
    return {} if vision is None else {"max_images": vision.max_images, "bytes_per_image": vision.bytes_per_image}


def _table(*columns: str, title: str | None = None) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_table(table: Any) -> None:
    from rich.console import Console

    # without markup: names from files are shown as they are
    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(width=140, markup=False)
    console.print(table)


def _print_facts(facts: dict[str, Any], title: str) -> None:
    table = _table("", "", title=title)
    for key, value in facts.items():
        table.add_row(legible(key), f"{value:,}" if isinstance(value, int) else legible(str(value)))
    _print_table(table)


def _print_manifest(manifest: "Manifest", title: str) -> None:
    cache = manifest.cache
    facts: dict[str, Any] = {
        "model": f"{manifest.config['model_type']}, {manifest.config['num_hidden_layers']} layers",
        "layout": f"{manifest.layout}, {manifest.precision}",
        **({} if manifest.quantization is None else {"weights": _weights_line(manifest.quantization)}),
        "cache": f"{cache.max_len} tokens, {manifest.max_batch} rows at most, {cache.bytes_per_token:,} bytes a token",
    }
    if manifest.vision is not None:
        each = f"{manifest.vision.bytes_per_image:,} bytes each"
        facts["images"] = f"{manifest.vision.max_images} images a prompt at most, {each}"
    facts |= {name: f"{entry.bytes:,} bytes" for name, entry in manifest.files.items()}
    for name, engine in manifest.engines.items():
        archs = ", ".join(engine.gpu_archs) or DEFAULT_ARCHS.get(engine.target, "the library's default architectures")
        facts[f"{name} engine"] = f"version {engine.library_version}, for {archs}"
    verdict = "not run" if manifest.parity is None else "passed" if manifest.parity["passed"] else "FAILED"
    facts["parity"] = verdict
    _print_facts(facts, title)


def _weights_line(quantization: Mapping[str, Any]) -> str:
    formats = ", ".join(f"{count} {name}" for name, count in quantization["formats"].items())
    return f"{formats}; {quantization['bytes_per_weight']:.3f} bytes a weight; quantizer {quantization['quantizer']}"


def _print_known(as_json: bool) -> None:
    from exporter.inspection import known

    lists = known()
    if as_json:
        _print_json(lists)
        return
    for title, entries in lists.items():
        if isinstance(entries, dict):
            _print_facts(dict(entries), title=title)
        else:
            click.echo(f"{title}: {', '.join(entries)}")


def _print_signature(manifest: "Manifest") -> None:
    for name, graph in manifest.graphs.items():
        table = _table("tensor", "dtype", "shape", title=name if len(manifest.graphs) > 1 else None)
        for spec in (*graph.signature.inputs, *graph.signature.outputs):
            shape = ", ".join(str(dim) for dim in spec.shape)
            table.add_row(legible(spec.name), spec.dtype, legible(f"[{shape}]"))
        _print_table(table)


def _print_parity(summary: "ParitySummary") -> None:
    for report in summary.reports:
        table = _table("rung", "max error", "limit", "rms error", "limit", "eager's own", "", title=report.runtime)
        for rung in report.rungs:
            numbers = (rung.max_error, rung.max_limit, rung.rms_error, rung.rms_limit, rung.eager_max_error)
            table.add_row(rung.name, *(f"{n:.1e}" for n in numbers), "ok" if rung.passed else f"FAILED {rung.note}")
        _print_table(table)
        click.echo(f"reference: {report.reference}")
        click.echo(f"parity {'passed' if report.passed else 'FAILED'} on {report.runtime}")
    if summary.quality is not None:
        click.echo()
        _print_quality(summary.quality)
    for runtime, reason in summary.not_run.items():
        click.echo(f"not verified on {runtime}: {reason}")


def _print_quality(quality: "QualityReport") -> None:
    facts = {
        "KL divergence, mean": f"{quality.kl_mean:.3g}",
        "KL divergence, 99.9th percentile": f"{quality.kl_p999:.3g}",
        "same best token": f"{100 * quality.top1_agreement:.1f} %",
        "perplexity": f"{quality.perplexity_stored:.4g}, of the original weights {quality.perplexity_original:.4g}"
        f" ({quality.perplexity_difference:+.3g})",
        "bytes per weight": f"{quality.bytes_per_weight:.3f}",
    }
    for name, task in quality.tasks.items():
        before = f"of the original weights {100 * task.original:.1f} %"
        facts[f"task {name}"] = f"{100 * task.stored:.1f} % of {task.problems} problems, {before}"
    layers = ", ".join(f"{each.layer} {each.error:.2g}" for each in quality.worst_layers)
    facts["largest errors"] = layers
    title = f"quality of the stored weights, on {quality.tokens} tokens {quality.text}"
    _print_facts(facts, title)


if __name__ == "__main__":
    main()
