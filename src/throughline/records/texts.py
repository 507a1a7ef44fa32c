"""What a text is made of: documents with facts, tokens, and the roles that tokens play."""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Fact:
    """Something true of the characters start to end of a text: a name and its value, such as `carry` = 1."""

    name: str
    value: int | str | bool
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """One text. `answer_start` is the character at which the answer begins, if the text has one."""

    text: str
    answer_start: int | None = None
    facts: tuple[Fact, ...] = ()
    kind: str = ""


class Token(NamedTuple):
    """One token of a prompt as the model sees it; start and end are characters of the text (equal for special tokens)."""

    id: int
    text: str
    start: int
    end: int


TOKEN_KINDS = ("number", "word", "punctuation", "space", "other")
PARTS = ("question", "answer")  # the answer's part begins with the last token before it, where it is decided
NUM_ROLES = len(TOKEN_KINDS) * len(PARTS)


def role_of(kind: Any, in_answer: Any) -> Any:
    """The role of a token, or of an array of them: its kind, and the part of the text it stands in.

    This is what "the same kind of position" means wherever features are averaged or shuffled.
    """
    return kind + len(TOKEN_KINDS) * in_answer
