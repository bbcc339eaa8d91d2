"""What `export-llm generate` does: check the options against each other, open what they name, and continue a prompt."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.progress import Progress
from runtimes.artifact import Artifact, open_artifact
from runtimes.beam_search import BeamSearch, beam_search
from runtimes.decoding import Decoding
from runtimes.errors import FeedError
from runtimes.generation import Generation, generate, read_stop_ids
from runtimes.images import ImageBatch, show_images
from runtimes.prefix import Prefix
from runtimes.prefix_file import load_prefix, save_prefix
from runtimes.runner import Runner
from runtimes.sampling import Sampling
from runtimes.speculative import Draft, check_draft
from runtimes.stopping import check_stop_strings
from runtimes.tokenizer import Tokenizer

SAMPLING_OPTIONS = tuple(field.name for field in dataclasses.fields(Sampling))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """The command's options; `sampling` holds those fields of Sampling that were given.

    Raises:
        FeedError: options that say nothing together.
    """

    artifact: Path
    prompt: str
    images: tuple[Path, ...]
    max_new_tokens: int | None
    sampling: Mapping[str, Any]
    num_beams: int
    length_penalty: float | None
    stop_strings: tuple[str, ...]
    logprobs: bool
    prefix: Path | None
    save_prefix: Path | None
    prefill_chunk: int | None
    draft: Path | None
    draft_tokens: int | None
    as_json: bool

    def __post_init__(self) -> None:
        if self.num_beams != 1 and self.sampling:
            given = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.sampling.items())
            raise FeedError(
                f"{given} cannot go with --num-beams {self.num_beams}: beam search draws nothing by chance and takes"
                " tokens as likely as the model does; leave out the one or the other"
            )
        for name, value in (("--draft", self.draft), ("--save-prefix", self.save_prefix)):
            if self.num_beams != 1 and value is not None:
                raise FeedError(f"{name} cannot go with --num-beams {self.num_beams}: leave out the one or the other")
        if self.num_beams == 1 and self.length_penalty is not None:
            raise FeedError(
                f"--length-penalty {self.length_penalty} is for beam search: set --num-beams above 1 as well"
            )
        if self.draft is None and self.draft_tokens is not None:
            raise FeedError(f"--draft-tokens {self.draft_tokens} is how many tokens a draft proposes: give --draft too")
        if self.logprobs and not self.as_json:
            raise FeedError("--logprobs is for --json: give both")
        Sampling(**self.sampling)


@dataclasses.dataclass(kw_only=True)
class Opened:
    """All that a request names, ready to run. Use it in a `with` block, which closes the runners."""

    request: GenerateRequest
    artifact: Artifact
    tokenizer: Tokenizer
    prompt_ids: list[int]
    images: ImageBatch | None
    prefix: Prefix | None
    runner: Runner
    draft: Draft | None
    load_s: float
    closing: contextlib.ExitStack

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()

    def run(self, on_text: Callable[[str], None] | None) -> dict[str, Any]:
        """Generate; return what --json prints. Text is shown as it becomes certain, of beams at the end."""
        common: dict[str, Any] = {
            "images": self.images,
            "prefix": self.prefix,
            "prefill_chunk_tokens": self.request.prefill_chunk,
            "stop_ids": read_stop_ids(self.artifact.folder),
            "stop_strings": self.request.stop_strings,
            "decode": self.tokenizer.decode,
            "logprobs": self.request.logprobs,
        }
        facts = self._search(common, on_text) if self.request.num_beams != 1 else self._generate(common, on_text)
        return facts if self.prefix is None else facts | {"prefix_tokens": len(self.prefix.token_ids)}

    def _generate(self, common: Mapping[str, Any], on_text: Callable[[str], None] | None) -> dict[str, Any]:
        request = self.request
        result = generate(
            self.runner,
            [self.prompt_ids],
            request.max_new_tokens,
            sampling=Sampling(**request.sampling),
            draft=self.draft,
            on_prefill=self._save if request.save_prefix is not None else None,
            on_text=None if on_text is None else lambda _, text: on_text(text),
            **common,
        )
        (token_ids,) = result.token_ids
        facts = self._facts(result, result.texts[0], token_ids, result.finish_reasons[0], len(token_ids) - 1)
        if request.logprobs:
            facts |= {"token_logprobs": result.token_logprobs[0], "prompt_logprobs": result.prompt_logprobs[0]}
        if (report := result.draft) is not None:
            facts["draft"] = dataclasses.asdict(report) | {"acceptance_rate": report.acceptance_rate}
        return facts

    def _search(self, common: dict[str, Any], on_text: Callable[[str], None] | None) -> dict[str, Any]:
        request = self.request
        if request.length_penalty is not None:
            common["length_penalty"] = request.length_penalty
        result = beam_search(self.runner, [self.prompt_ids], request.num_beams, request.max_new_tokens, **common)
        hypotheses = result.hypotheses[0]
        best = hypotheses[0]
        facts = self._facts(result, best.text, best.token_ids, best.finish_reason, result.decode_steps)
        if request.logprobs:
            facts |= {"token_logprobs": best.token_logprobs, "prompt_logprobs": result.prompt_logprobs[0]}
        names = ("text", "token_ids", "finish_reason", "score")
        facts["beams"] = [{name: getattr(each, name) for name in names} for each in hypotheses]
        if on_text is not None:
            on_text(best.text)
        return facts

    def _save(self, decoding: Decoding) -> None:
        assert self.request.save_prefix is not None
        save_prefix(self.request.save_prefix, decoding.take_prefix(self.prompt_ids), self.artifact.manifest)

    def _facts(
        self, result: Generation | BeamSearch, text: str, token_ids: list[int], finish_reason: str, decoded: int
    ) -> dict[str, Any]:
        """What is said of every result; `decoded` tokens came after the prompt's own."""
        timings = {
            "load_s": round(self.load_s, 4),
            "prefill_s": round(result.prefill_s, 4),
            "decode_s": round(result.decode_s, 4),
            "decode_tokens_per_s": round(decoded / result.decode_s, 1) if decoded else None,
        }
        return {
            "text": text,
            "prompt_ids": self.prompt_ids,
            "token_ids": token_ids,
            "finish_reason": finish_reason,
            "timings": timings,
        }


def open_all(request: GenerateRequest, open_runner: Callable[[Artifact], Runner], progress: Progress) -> Opened:
    """Open the artifact and whatever else the request names.

    Raises:
        ArtifactError, FeedError, RuntimeMissingError: something is damaged, missing, or does not fit the artifact.
    """
    progress.start("check hashes")
    artifact = open_artifact(request.artifact)
    draft_artifact = None if request.draft is None else open_artifact(request.draft)
    tokenizer = Tokenizer(artifact.folder)
    check_stop_strings(request.stop_strings, tokenizer.decode)
    prompt_ids = tokenizer.encode(request.prompt)
    images = show_images(artifact, [prompt_ids], [request.images])
    prefix = None if request.prefix is None else load_prefix(request.prefix, artifact.manifest)
    if draft_artifact is not None:
        check_draft(artifact, draft_artifact)
    progress.start("load")
    start = time.perf_counter()
    draft = None
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_runner(artifact))
        if draft_artifact is not None:
            draft_runner = stack.enter_context(open_runner(draft_artifact))
            tokens = {} if request.draft_tokens is None else {"tokens": request.draft_tokens}
            draft = Draft(runner=draft_runner, **tokens)
        closing = stack.pop_all()
    return Opened(
        request=request,
        artifact=artifact,
        tokenizer=tokenizer,
        prompt_ids=prompt_ids,
        images=images,
        prefix=prefix,
        runner=runner,
        draft=draft,
        load_s=time.perf_counter() - start,
        closing=closing,
    )


def describe_draft(facts: Mapping[str, Any]) -> str:
    """What --json says of the draft, as a sentence."""
    draft = facts["draft"]
    rate = "" if draft["acceptance_rate"] is None else f" ({100 * draft['acceptance_rate']:.1f} %)"
    return (
        f"draft: {draft['accepted']} of {draft['proposed']} proposed tokens accepted{rate};"
        f" {len(facts['token_ids'])} tokens in {draft['target_calls']} calls after the prompt's"
    )
