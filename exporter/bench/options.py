"""The command's options that are lists."""

from collections.abc import Sequence

from exporter.bench.peers import PEERS
from exporter.errors import ExportError


def read_lengths(text: str | None) -> tuple[int, ...]:
    """`128,512`; nothing where nothing was given."""
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ExportError(f"--prompt-tokens takes whole numbers such as 128,512, got {text!r}") from None


def read_pythons(texts: Sequence[str]) -> dict[str, str]:
    """{peer: interpreter} of PYTHON, which is for every peer, and PEER=PYTHON, which is for one.

    Raises:
        ExportError: an unknown peer.
    """
    everyones = {peer: text for text in texts if "=" not in text for peer in PEERS}
    own = dict(text.split("=", 1) for text in texts if "=" in text)
    for peer in own:
        if peer not in PEERS:
            raise ExportError(f"--peer-python {peer}=..: {peer!r} is no peer; known: {', '.join(PEERS)}")
    return everyones | own
