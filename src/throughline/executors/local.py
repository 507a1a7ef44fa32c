"""Jobs in this process, one after another."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from throughline.errors import ThroughlineError, TrainingError

J = TypeVar("J")


def run_jobs(jobs: Sequence[J], work: Callable[[J], None], name_of: Callable[[J], str]) -> None:
    """Do every job. One that fails of its own does not keep the others from being done; all failures are named at the end.

    Raises the failure itself if there is one, TrainingError naming all if there are more.
    """
    failures: list[tuple[str, ThroughlineError]] = []
    for job in jobs:
        try:
            work(job)
        except ThroughlineError as error:
            failures.append((name_of(job), error))
    raise_failures(failures)


def raise_failures(failures: Sequence[tuple[str, ThroughlineError]]) -> None:
    """Raise the failure if there is one, TrainingError naming all, by what failed, if there are more."""
    if len(failures) == 1:
        raise failures[0][1]
    if failures:
        raise TrainingError("; ".join(f"{name}: {error}" for name, error in failures))


@contextmanager
def threads(num: int | None) -> Iterator[None]:
    """So many threads for torch while the block runs; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(num or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
