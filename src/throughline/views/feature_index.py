"""All features of a run in memory, in the few columns that lists need, searched within a tenth of a second.

1. each feature with its best label (`rank_labels`) and its top tokens, one row each
2. `search` is label and tokens in lower case, so that a search is one pass over one column
3. for each column that sorts there is, once it was asked for, the place of each row in that order; a page is then the
   smallest places among the rows that were found, without sorting all of them
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from throughline.records import FEATURE_COLUMNS, LABEL_COLUMNS, rank_labels, reaches
from throughline.run_dir import RunDir
from throughline.views.answers import FeatureName, FeatureRow

SortBy = Literal["f1", "density", "max", "num_active", "layer", "label"]
KEYS = ["layer", "feature"]
SHOWN_TOKENS = 5
KEPT_SEARCHES = 8  # whose rows are remembered; 6 MB each if all of 1.6 million are found
BETWEEN_TOKENS = "\x1f"  # a control character that separates, so no search by mistake spans two tokens


@dataclass(frozen=True)
class FeatureQuery:
    """Which features, in which order, and which page of them. None: any."""

    text: str = ""
    models: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    min_density: float | None = None
    max_density: float | None = None
    min_f1: float | None = None
    labelled: bool | None = None  # with a label that reaches the bar
    source: str | None = None
    sort: SortBy = "f1"
    descending: bool = True
    offset: int = 0
    limit: int = 50


class Found(NamedTuple):
    """How many there are, and the rows of one page."""

    total: int
    rows: list[FeatureRow]


class FeatureIndex:
    """The features of all models of a run."""

    def __init__(self, tables: dict[str, tuple[pl.DataFrame, pl.DataFrame | None]], bar: float) -> None:
        """`tables` are features and labels by model."""
        frames = [_index_model(name, features, labels, bar) for name, (features, labels) in tables.items()]
        self.frame = (pl.concat(frames) if frames else _index_model("", _empty(FEATURE_COLUMNS), None, bar)).rechunk()
        self._orders: dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]] = {}
        self._found: OrderedDict[FeatureQuery, np.ndarray] = OrderedDict()
        self._lock = Lock()
        groups = self.frame.with_row_index("row").group_by("model", "layer").agg(pl.col("row").min(), pl.len())
        self._numbers = self.frame["feature"].to_numpy()  # ascending within a layer
        self._layers = {(model, layer): (row, num) for model, layer, row, num in groups.iter_rows()}

    def count(self, model: str) -> tuple[int, int]:
        """Features of a model, and those with a label that reaches the bar."""
        mine = self.frame.filter(pl.col("model") == model)
        return mine.height, int(mine["reached"].sum())

    def prepare(self) -> None:
        """Make the usual orders before somebody asks for them: of 1.6 million rows each takes 0.1 to 0.2 s."""
        for sort in ("f1", "density", "max"):
            self._order(sort, True)

    def find(self, query: FeatureQuery) -> Found:
        """One page of the features that a query asks for."""
        order, places_N = self._order(query.sort, query.descending)
        rows = self._rows(query)
        if rows is None:
            page, total = order[query.offset : query.offset + query.limit], len(order)
        else:
            total, end = len(rows), min(query.offset + query.limit, len(rows))
            places = places_N[rows]
            first = np.argpartition(places, end - 1)[:end] if query.offset < end < total else np.arange(total)
            page = rows[first[np.argsort(places[first])][query.offset : end]] if query.offset < end else rows[:0]
        return Found(total, [_row(row) for row in self.frame[page.tolist()].iter_rows(named=True)])

    def _rows(self, query: FeatureQuery) -> np.ndarray | None:
        """The rows that a query asks for, None for all of them; kept for its next pages and other orders."""
        asked = replace(query, sort="f1", descending=True, offset=0, limit=0)
        conditions = _conditions(asked)
        if not conditions:
            return None
        with self._lock:
            if asked in self._found:
                self._found.move_to_end(asked)
                return self._found[asked]
        is_found = self.frame.select(pl.all_horizontal(conditions).fill_null(False)).to_series().to_numpy()
        rows = np.flatnonzero(is_found).astype(np.uint32)
        with self._lock:
            self._found[asked] = rows
            while len(self._found) > KEPT_SEARCHES:
                self._found.popitem(last=False)
        return rows

    def name(self, places: Sequence[tuple[str, int, int]]) -> list[FeatureName]:
        """Features, by model, layer and number, as others speak of them, in the order asked for."""
        rows = [self._row(*place) for place in places]
        known = self.frame[[row for row in rows if row is not None]].iter_rows(named=True)
        return [_name(*place, None if row is None else next(known)) for place, row in zip(places, rows, strict=True)]

    def _row(self, model: str, layer: int, feature: int) -> int | None:
        start, num = self._layers.get((model, layer), (0, 0))
        row = start + int(np.searchsorted(self._numbers[start : start + num], feature))
        return row if row < start + num and self._numbers[row] == feature else None

    def _order(self, sort: str, descending: bool) -> tuple[np.ndarray, np.ndarray]:
        """The rows in an order, and the place of each row in it.

        What has no value comes last either way, and equal ones in the order of the run.
        """
        with self._lock:
            if (sort, descending) not in self._orders:
                sorted_rows = self.frame.select(sort).with_row_index("row")
                sorted_rows = sorted_rows.sort(sort, descending=descending, nulls_last=True, maintain_order=True)
                order = sorted_rows["row"].to_numpy()
                places = np.empty(len(order), np.uint32)
                places[order] = np.arange(len(order), dtype=np.uint32)
                self._orders[sort, descending] = (order, places)
            return self._orders[sort, descending]


def load_index(run: RunDir) -> FeatureIndex:
    """The index of what tables the run has."""
    study, tables = run.study(), {}
    for spec in study.models:
        if run.has_table(spec.name, "features"):
            labels = run.table(spec.name, "labels") if run.has_table(spec.name, "labels") else None
            features = run.scan_table(spec.name, "features").select(*KEYS, "density", "num_active", "max", "top_tokens")
            tables[spec.name] = (features.collect(), labels)
    return FeatureIndex(tables, study.features.bar)


def _index_model(name: str, features: pl.DataFrame, labels: pl.DataFrame | None, bar: float) -> pl.DataFrame:
    labels = _empty(LABEL_COLUMNS) if labels is None else labels
    types = {key: features.schema[key] for key in KEYS}
    labels = labels.with_columns(pl.col("f1").fill_nan(None))  # NaN is more than any number, and would pass as a score
    ranked = rank_labels(labels.cast(types).with_columns(reached=reaches(bar).fill_null(False)), bar)  # pyright: ignore[reportArgumentType]
    best = ranked.unique(KEYS, keep="first", maintain_order=True).select(*KEYS, "label", "source", "f1", "reached")
    tokens = pl.col("top_tokens").list.head(SHOWN_TOKENS).list.join(BETWEEN_TOKENS).fill_null("")
    joined = features.select(*KEYS, "density", "num_active", "max", tokens=tokens).join(
        best, on=KEYS, how="left", maintain_order="left"
    )
    text = pl.concat_str(pl.col("label").fill_null(""), pl.lit(BETWEEN_TOKENS), pl.col("tokens")).str.to_lowercase()
    return joined.sort(KEYS).select(
        pl.lit(name).alias("model").cast(pl.Categorical),
        pl.col("layer").cast(pl.Int32),
        pl.col("feature").cast(pl.Int32),
        pl.col("density", "max").fill_nan(None),
        "f1",
        "num_active",
        "label",
        pl.col("source").cast(pl.Categorical),
        pl.col("reached").fill_null(False),
        "tokens",
        search=text,
    )


def _empty(columns: dict[str, pl.DataType]) -> pl.DataFrame:
    return pl.DataFrame(schema=columns)


def _conditions(query: FeatureQuery) -> list[pl.Expr]:
    wanted = {
        "text": lambda: pl.col("search").str.contains(query.text.lower(), literal=True),
        "models": lambda: pl.any_horizontal(pl.col("model") == name for name in query.models),
        "layers": lambda: pl.col("layer").is_in(list(query.layers)),
        "min_density": lambda: pl.col("density") >= query.min_density,
        "max_density": lambda: pl.col("density") <= query.max_density,
        "min_f1": lambda: pl.col("f1") >= query.min_f1,
        "labelled": lambda: pl.col("reached") == query.labelled,
        "source": lambda: pl.col("source") == query.source,
    }
    return [make() for name, make in wanted.items() if getattr(query, name) not in (None, "", ())]


def _row(row: dict) -> FeatureRow:
    return FeatureRow(**{name: row[name] for name in FeatureRow.model_fields if name != "tokens"}, tokens=_tokens(row))


def _tokens(row: dict) -> list[str]:
    return row["tokens"].split(BETWEEN_TOKENS) if row["tokens"] else []


def _name(model: str, layer: int, feature: int, row: dict | None) -> FeatureName:
    label = row["label"] if row and row["reached"] else None
    return FeatureName(model=model, layer=layer, feature=feature, label=label, tokens=_tokens(row) if row else [])
