"""What a user can get wrong about an export: always with a message that says how to mend it."""

from runtimes.errors import legible


class ExportError(ValueError):
    """The export cannot be done as it was asked for."""

    def __init__(self, message: str = "") -> None:
        super().__init__(legible(message))
