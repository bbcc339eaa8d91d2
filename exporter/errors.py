"""What a user can get wrong about an export: always with a message that says how to mend it."""


class ExportError(ValueError):
    """The export cannot be done as it was asked for."""
