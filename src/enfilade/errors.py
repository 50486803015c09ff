"""The one exception that carries a sentence for the user."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence: what was wrong, where, and what to do. The command line prints the sentence
    and exits with code 2; from Python it is an ordinary ValueError."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a look-up: the nearest known names, or all of them."""
    known, name = list(known), str(name)
    if len(name) > 200:  # nobody's slip of the pen; it may come from a file or over the network
        name = f"{name[:200]}..."
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f"there are {', '.join(known[:20])}{' and more' if len(known) > 20 else ''}"
    return UserError(f"no {kind} {name!r}; {hint}")
