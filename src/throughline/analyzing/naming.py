"""What features are about, in the words of their labels."""

import polars as pl

NUM_LABELS = 5


def most_frequent(rows: pl.DataFrame) -> str:
    """The most frequent of a column `label` with how often each stands there; empty if there are none."""
    counts = rows.group_by("label").len().sort(["len", "label"], descending=[True, False]).head(NUM_LABELS)
    return ", ".join(f"{label!r} ({count})" for label, count in counts.iter_rows())
