"""What a caller can get wrong about an artifact or a runtime: always with a message that says how to mend it."""


class ArtifactError(ValueError):
    """The artifact is damaged, absent, or not what was asked for."""


class EngineLoadError(ArtifactError):
    """The engine is of no use on this machine; it may be whole, and made for another GPU."""


class RuntimeMissingError(RuntimeError):
    """The library, provider or device that a runner needs is not there."""


class FeedError(ValueError):
    """Inputs of the wrong name, dtype, shape or length."""
