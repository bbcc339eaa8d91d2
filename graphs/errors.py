"""What a user can get wrong about a model: one exception, always with a message that says how to mend it."""


class CheckpointError(ValueError):
    """The checkpoint or its config.json cannot be exported as it is; the message names what, and what to do."""
