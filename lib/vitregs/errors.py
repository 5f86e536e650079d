"""A mistake in the input becomes one line that names the nearest right word."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A mistake in the input, with a message of one line that a person can act on."""

    def __init__(self, message: str) -> None:
        """Keep the message on one line, whatever it quotes."""
        super().__init__(" ".join(message.split()))


class Damaged(InputError):
    """A file that is there and cannot be read."""


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop and kept what it had: how to go on, and the exit code of a process that ends by it."""

    def __init__(self, message: str, code: int) -> None:
        """Keep one line for the user, and the exit code (128 and the number of the signal)."""
        super().__init__(message)
        self.code = code


def unknown(what: str, name: object, choices: Iterable[str]) -> InputError:
    """Make the InputError for a name that does not exist: what it names, the name, the right ones → InputError with
    the nearest."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = "choose from " + ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return InputError(f"unknown {what} {str(name)!r}: {hint}")


EXTRAS = {  # what each optional extra of the package brings
    "book": ("papermill", "jupyter_client", "nbclient", "ipykernel", "IPython"),
    "train": ("kornia", "lightly", "open_clip"),
    "hub": ("datasets", "pyarrow"),
}


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Import packages that an extra brings, inside the block. Raises InputError naming the extra where one is not installed.

    Args:
        name: the extra, of EXTRAS.
        what: what they are needed for, as the subject of "needs more packages".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS[name]:
            raise
        raise InputError(f"{what} needs more packages: pip install 'vitregs[{name}]'") from error
