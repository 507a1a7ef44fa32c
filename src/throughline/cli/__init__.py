"""The command line. One module a concern: commands here, what they print in `render`, the live table in `live`.

Exit codes: 0 done, 1 a gate or a job failed, 2 the user's input is wrong (one line on standard error), 130 stopped by Ctrl-C.
"""

import errno
import gc
import os
import sys
from io import TextIOWrapper
from typing import NoReturn

STOPPED = 130
OBJECTS_BETWEEN_COLLECTIONS = 50_000  # where Python has 700: nearly all that imports make stays
MOSTLY_IMPORTS = ("trace", "compare")  # commands whose seconds are mostly imports
USER_CAN_MEND = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of `throughline`: run a command, and print errors of the user's making as one line."""
    from typer.exceptions import TyperException

    from throughline import lean_imports
    from throughline.cli.commands import app
    from throughline.errors import ThroughlineError

    if arguments is None:  # a process of ours alone
        lean_imports.wanted = True
        if len(sys.argv) > 1 and sys.argv[1] in MOSTLY_IMPORTS:
            gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no Δ shows a question mark
    try:
        code = app(arguments, prog_name="throughline", standalone_mode=False) or 0
        sys.stdout.flush()
    except ThroughlineError as error:
        _end(str(error), error.exit_code)
    except TyperException as error:
        said = error.format_message().rstrip(".")
        _end(f"{said}{' See' if said.endswith('?') else '; see'} throughline {_asked(arguments)}--help", 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = STOPPED if isinstance(stop, KeyboardInterrupt) else stop.code
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror or error}", 2 if error.errno in USER_CAN_MEND else 1)
    if code == STOPPED:
        _end("stopped; train and run continue with --resume, demo with the same command", STOPPED)
    sys.exit(code)


def _end(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"throughline: {' '.join(line.split())}\n")
    sys.exit(code)


def _asked(arguments: list[str] | None) -> str:
    """The command that was asked for, if it is one, with a space."""
    from throughline.cli.commands import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    first = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    return f"{first} " if first in names else ""
