"""The Hugging Face hub, which may be away."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread


def _answers(address: str, seconds: float) -> bool:
    """Ask a server for any sign of life: address, patience → whether it came. A thread, as looking up a name can hang."""
    from huggingface_hub.utils import get_session

    heard: list[object] = []

    def ask() -> None:
        try:
            heard.append(get_session().head(address, timeout=seconds))
        except Exception:  # the HTTP library differs between hub versions; any failure means no answer
            return

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(heard)


@contextmanager
def hub(seconds: float = 4.0) -> Iterator[bool]:
    """Use the Hugging Face hub: patience in seconds → whether it answers.

    If it does not, its clients work from their cache alone inside the block, where they would retry for a minute.
    """
    from huggingface_hub import constants

    clients = [constants, *(m for m in [sys.modules.get("datasets.config")] if m)]
    before = [m.HF_HUB_OFFLINE for m in clients]
    alive = not any(before) and _answers(constants.ENDPOINT, seconds)
    try:
        for module in clients:
            module.HF_HUB_OFFLINE = not alive  # type: ignore[attr-defined]
        yield alive
    finally:
        for module, value in zip(clients, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
