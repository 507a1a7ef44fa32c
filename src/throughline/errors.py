"""What can go wrong by the user's doing, and by the data's: one hierarchy, each printed as one line."""


class ThroughlineError(Exception):
    """Base of every error that is shown as one line; `exit_code` is the command's."""

    exit_code = 1


class InputError(ThroughlineError):
    """The user's input is wrong. Says what was expected, what was found, where, and what to type."""

    exit_code = 2


class GateError(ThroughlineError):
    """A dictionary failed the quality gate, so nothing is built on it."""


class DamagedFileError(ThroughlineError):
    """A file of a run does not match its checksum, or a dictionary does not match its probe."""


class HeldError(ThroughlineError):
    """Another process works on this run."""


class TrainingError(ThroughlineError):
    """Training cannot go on (a NaN, a full disk); names the step and the layer."""
