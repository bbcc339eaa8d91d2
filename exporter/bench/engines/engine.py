"""What every engine offers to the worker. Its library is imported when the engine is made, and not before."""

from typing import Protocol


class Engine(Protocol):
    """A loaded model that continues prompts greedily and never stops early.

    Made by `Engine(model, threads=.., **options)`. A module of an engine that makes its model from a checkpoint has
    `prepare(checkpoint, precision, folder) -> Path` as well.
    """

    description: str  # library and version, for reports
    weight_bytes: int | None  # that are read for each token; None: the model is an ONNX graph, which says so
    cache_number_bytes: int | None  # of one number in its cache; None: as in the artifact's

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        """Start anew with a cache for the prompts and `new_tokens` more; return the first new token of each row."""

    def decode(self, steps: int) -> list[list[int]]:
        """Go on for `steps` tokens; return for each step the new token of each row."""

    def close(self) -> None:
        """Release memory."""
