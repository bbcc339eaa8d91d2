"""What a caller can get wrong about an artifact or a runtime: always with a message that says how to mend it."""

MOST_CHARACTERS = 20_000  # of a message: damaged files have names of any length


def legible(message: str) -> str:
    """Text that a terminal shows as it is: names from files may hold control characters, and be endless."""
    if len(message) > MOST_CHARACTERS:
        message = f"{message[:MOST_CHARACTERS]} .. and {len(message) - MOST_CHARACTERS:,} characters more"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)


class ArtifactError(ValueError):
    """The artifact is damaged, absent, or not what was asked for."""

    def __init__(self, message: str = "") -> None:
        super().__init__(legible(message))


class EngineLoadError(ArtifactError):
    """The engine is of no use on this machine; it may be whole, and made for another GPU."""


class RuntimeMissingError(RuntimeError):
    """The library, provider or device that a runner needs is not there."""

    def __init__(self, message: str = "") -> None:
        super().__init__(legible(message))


class FeedError(ValueError):
    """Inputs of the wrong name, dtype, shape or length."""

    def __init__(self, message: str = "") -> None:
        super().__init__(legible(message))
