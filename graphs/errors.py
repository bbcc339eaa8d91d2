"""What a user can get wrong about a model: one exception, always with a message that says how to mend it."""

MOST_CHARACTERS = 20_000  # of a message: damaged files have names of any length


class CheckpointError(ValueError):
    """The checkpoint or its config.json cannot be exported as it is; the message names what, and what to do."""

    def __init__(self, message: str, *, key: tuple[str, ...] = ()) -> None:
        super().__init__(legible(message))
        self.key = key  # which key of config.json is refused, from the outermost object in; (): not one alone


def legible(message: str) -> str:
    """Text that a terminal shows as it is: names from files may hold control characters, and be endless."""
    if len(message) > MOST_CHARACTERS:
        message = f"{message[:MOST_CHARACTERS]} .. and {len(message) - MOST_CHARACTERS:,} characters more"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
