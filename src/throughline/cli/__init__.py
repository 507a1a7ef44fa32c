"""The command line. One module a concern: commands here, what they print in `render`, the live table in `live`.

Exit codes: 0 done, 1 a gate or a job failed, 2 the user's input is wrong (one line on standard error).
"""

import sys


def main() -> None:
    """Entry point of `throughline`: run a command, and print errors of the user's making as one line."""
    from throughline.cli.commands import app
    from throughline.errors import ThroughlineError

    try:
        app()
    except ThroughlineError as error:
        sys.stderr.write(f"throughline: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("throughline: stopped; continue with --resume\n")
        sys.exit(130)
