"""The one exception that carries a sentence for the user."""


class UserError(ValueError):
    """Bad input, told in one sentence: what was wrong, where, and what to do. The command line prints the sentence
    and exits with code 2; from Python it is an ordinary ValueError."""
