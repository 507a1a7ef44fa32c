"""Requests that are refused: a status and one sentence."""


class RefusedError(Exception):
    """The request cannot be met. `retry_seconds` says when it may be."""

    def __init__(self, status: int, sentence: str, retry_seconds: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_seconds = status, sentence, retry_seconds


def unknown_thing(kind: str, found: object, known: list) -> RefusedError:
    """404 that says what there is."""
    shown = ", ".join(str(name) for name in known[:8]) + (", …" if len(known) > 8 else "")
    return RefusedError(404, f"there is no {kind} {str(found)[:80]!r}; there is {shown or 'none'}")
