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
    """Entry point of `throughline`: run a command, and print errors of the user's making as one line.

    If standard output was closed before it began (`>&-`), it ends with 1 as soon as something is to be printed there.
    """
    unheard = _replace_closed_streams()
    try:
        _run(arguments, unheard)
    finally:
        if unheard:
            _forget_output()


def _run(arguments: list[str] | None, unheard: bool) -> NoReturn:
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
        _forget_output()
        sys.exit(1)
    except OSError as error:
        if unheard and error.errno == errno.EBADF:
            sys.exit(1)
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror or error}", 2 if error.errno in USER_CAN_MEND else 1)
    if code == STOPPED:
        _end("stopped; train and run continue with --resume, demo with the same command", STOPPED)
    sys.exit(code)


def _replace_closed_streams() -> bool:
    """Give a standard stream that was closed before we began a stand-in, so that no file of ours takes its number.

    True if there is no standard output; what is written to its stand-in, which is open for reading, raises EBADF.
    """
    unheard = sys.stdout is None
    stand_ins = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    for number, (name, flags, mode) in enumerate(stand_ins):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
    return unheard


def _forget_output() -> None:
    """Let what is still to be written to standard output go nowhere, in place of an error when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"throughline: {' '.join(line.split())}\n")
    sys.exit(code)


def _asked(arguments: list[str] | None) -> str:
    """The command that was asked for, if it is one, with a space."""
    from throughline.cli.commands import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    first = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    return f"{first} " if first in names else ""
