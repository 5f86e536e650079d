"""What a user can get wrong, said in one line."""

import difflib
from collections.abc import Iterable


class Problem(ValueError):
    """A mistake in the input, with a message of one line that a person can act on."""


def unknown(what: str, name: object, choices: Iterable[str]) -> Problem:
    """Make the Problem for a name that does not exist: (what, name, choices) → Problem that names the nearest right one."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = "choose from " + ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return Problem(f"unknown {what} {str(name)!r}: {hint}")
