"""The command line: finds the verb, parses its options, runs it, and turns errors into a line and an exit code.

0: done. 1: done, but some inputs were bad (named on stderr). 2: bad input or arguments. 70: a fault of ours. 130:
interrupted. What a user can mend is one line on stderr; `--debug` or ENFILADE_DEBUG=1 shows the traceback.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

import tyro
from tyro.conf import FlagCreatePairsOff

import enfilade
from enfilade.errors import UserError, unknown
from enfilade.options import complain
from enfilade.verbs import VERBS, Verb


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("ENFILADE_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":  # one of many processes under torchrun: only the first prints
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            return dispatch(words)
        except SystemExit as stop:  # tyro's: 0 after help, 2 after a usage error, which it has printed
            return stop.code if isinstance(stop.code, int) else 2
        except KeyboardInterrupt:
            complain("interrupted")
            return 130
        except BrokenPipeError:  # `enfilade info | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 141
        except Exception as error:
            if debug:
                traceback.print_exc()
            code, message = explain(error)
            complain(message)
            return code


def dispatch(words: list[str]) -> int:
    """Find the verb in `words`, parse the rest for it, run it."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(top_level_help())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"enfilade {enfilade.__version__}")
        return 0
    length = 2 if words[0] == "data" else 1
    name, rest = " ".join(words[:length]), words[length:]
    if words[0] == "data" and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(top_level_help("data "))
        return 0 if len(words) > 1 else 2
    if name not in VERBS:
        verbs = VERBS if length == 1 else [v for v in VERBS if v.startswith("data ")]
        raise unknown("verb", name, verbs)
    verb: Verb = tyro.cli(VERBS[name], prog=f"enfilade {name}", args=rest, config=(FlagCreatePairsOff,))
    return verb.run()


def top_level_help(prefix: str = "") -> str:
    lines = [f"usage: enfilade {prefix}VERB ... [--debug]", "", (enfilade.__doc__ or "").split("\n")[0], ""]
    for name, verb in VERBS.items():
        if name.startswith(prefix):
            lines.append(f"  {name:<14}{(verb.__doc__ or '').strip().splitlines()[0]}")
    lines += ["", "enfilade VERB --help tells of a verb; enfilade --version of the version."]
    lines += ["--debug shows the traceback of an error."]
    return "\n".join(lines)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for an error."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, OSError):
        known = error.strerror and error.filename
        return 2, f"{error.filename}: {error.strerror}" if known else str(error) or type(error).__name__
    if isinstance(error, ValueError):
        return 2, f"{error} (--debug shows where)"
    return 70, f"this is a fault in Enfilade: {type(error).__name__}: {error}; please report it with --debug's output"


if __name__ == "__main__":
    sys.exit(main())
