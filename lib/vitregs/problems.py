"""What a user can get wrong, said in one line; and the network, which may be away."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Thread


class Problem(ValueError):
    """A mistake in the input, with a message of one line that a person can act on."""

    def __init__(self, message: str) -> None:
        """Keep the message on one line, whatever it quotes."""
        super().__init__(" ".join(message.split()))


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop and kept what it had: how to go on, and the exit code of a process that ends by it."""

    def __init__(self, message: str, code: int) -> None:
        """Keep one line for the user, and the exit code (128 and the number of the signal)."""
        super().__init__(message)
        self.code = code


def unknown(what: str, name: object, choices: Iterable[str]) -> Problem:
    """Make the Problem for a name that does not exist: what it names, the name, the right ones → Problem with the nearest."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = "choose from " + ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return Problem(f"unknown {what} {str(name)!r}: {hint}")


EXTRAS = {  # what each optional extra of the package brings
    "book": ("papermill", "jupyter_client", "nbclient", "ipykernel", "IPython"),
    "train": ("kornia", "lightly", "open_clip"),
    "hub": ("datasets", "pyarrow"),
}


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Import packages that an extra brings, inside the block. Raises Problem naming the extra where one is not installed.

    Args:
        name: the extra, of EXTRAS.
        what: what they are needed for, as the subject of "needs more packages".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS[name]:
            raise
        raise Problem(f"{what} needs more packages: pip install 'vitregs[{name}]'") from error


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
