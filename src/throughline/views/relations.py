"""How features relate: one feature with its contexts, partners and throughline; transfer matrices and the pairs behind a cell.

Of results that hold an entry for every feature, only what is asked for is read: a 98-layer run's are a gigabyte.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from safetensors import safe_open

from throughline.records import PARTS, TOKEN_KINDS, TransferInfo, complete_labels, rank_labels, reaches
from throughline.run_dir import RunDir
from throughline.views.answers import (
    Context,
    FeatureAnswer,
    Pair,
    PairPage,
    Partner,
    ScoredLabel,
    Throughline,
    TransferAnswer,
)
from throughline.views.fresh import Fresh
from throughline.views.reading import RunReader
from throughline.views.refusals import RefusedError, unknown_thing

ROLES = [f"{kind} in the {part}" for part in PARTS for kind in TOKEN_KINDS]
MATCHING = "matching"
MOST_KEPT_BYTES = 16_000_000  # of a table's file that is kept in memory


class Cell(NamedTuple):
    """The matched features of two layers, best correlated first, and how many correlate more than chance gives."""

    sources: np.ndarray
    targets: np.ndarray
    correlations: np.ndarray
    threshold: float
    num_above: int


class Relations:
    """What the run says of single features and of pairs of layers."""

    def __init__(self, reader: RunReader) -> None:
        self._reader, self._run = reader, reader.run
        self._tables: dict[tuple[str, str], Fresh[pl.LazyFrame | None]] = {}
        self._files: dict[tuple[str, str, str], Fresh[Any]] = {}

    # ---- one feature

    def feature(self, model: str, layer: int, feature: int) -> FeatureAnswer:
        """All that is known of a feature; RefusedError 404 if there is none of this number."""
        self._reader.model(model)
        found = self._rows(model, "features", layer, feature)
        if found is None or not found.height:
            raise RefusedError(
                404, f"{model} has no feature {feature} in layer {layer}; /api/features lists what there is"
            )
        row = found.row(0, named=True)
        roles = dict(zip(ROLES, row.pop("role_means"), strict=False))
        for name in ("top_tokens", "promoted", "suppressed"):
            row[name] = row[name] or []
        contexts = self._rows(model, "examples", layer, feature)
        return FeatureAnswer(
            model=model,
            **row,
            roles=roles,
            labels=self._labels(model, layer, feature),
            contexts=[
                Context(**{name: context[name] for name in Context.model_fields})
                for context in (contexts.iter_rows(named=True) if contexts is not None else ())
            ],
            partners=self._partners(model, layer, feature),
            throughline=self._throughline(model, layer, feature),
        )

    def _rows(self, model: str, table: str, layer: int, feature: int) -> pl.DataFrame | None:
        """A table's rows about one feature; None if the run has no such table."""
        frame = self._table(model, table)
        if frame is None:
            return None
        return frame.filter((pl.col("layer") == layer) & (pl.col("feature") == feature)).collect()

    def _table(self, model: str, table: str) -> pl.LazyFrame | None:
        run, key = self._run, (model, table)
        if key not in self._tables:
            self._tables[key] = Fresh(lambda: run.stamp("tables"), lambda: _open_table(run, model, table))
        return self._tables[key].get()

    def _labels(self, model: str, layer: int, feature: int) -> list[ScoredLabel]:
        found = self._rows(model, "labels", layer, feature)
        if found is None:
            return []
        bar = self._reader.study.features.bar
        known = complete_labels(found).with_columns(pl.col(pl.Float64).fill_nan(None))
        ranked = rank_labels(known, bar).with_columns(reached=reaches(bar).fill_null(False))
        names = [name for name in ScoredLabel.model_fields if name != "text"]
        rows = [row for row in ranked.iter_rows(named=True) if None not in (row["f1"], row["precision"], row["recall"])]
        return [ScoredLabel(text=row["label"], **{name: row[name] for name in names}) for row in rows]

    def _partners(self, model: str, layer: int, feature: int) -> list[Partner]:
        """The best match in every layer of every model that was matched with this one."""
        places, measured = [], []
        for info in self._reader.transfers.get():
            if (info.metric, info.source) != (MATCHING, model) or layer not in info.source_layers:
                continue
            place = info.source_layers.index(layer)
            with self.open(info) as arrays:
                if feature >= arrays.get_slice("partner").get_shape()[2]:
                    continue
                matched = arrays.get_slice("partner")[place, :, feature]
                correlations = arrays.get_slice("correlation")[place, :, feature]
                thresholds = arrays.get_slice("threshold")[place, :]
            for column, there in enumerate(info.target_layers):
                if matched[column] < 0 or not np.isfinite(correlations[column]):
                    continue
                if (info.target, there, int(matched[column])) == (model, layer, feature):
                    continue  # itself
                places.append((info.target, there, int(matched[column])))
                measured.append((float(correlations[column]), float(thresholds[column])))
        names = self._reader.index.name(places)
        return [
            Partner(partner=name, correlation=r, threshold=threshold, above_chance=r > threshold)
            for name, (r, threshold) in zip(names, measured, strict=True)
        ]

    def _throughline(self, model: str, layer: int, feature: int) -> Throughline | None:
        found, table = self._rows(model, "throughlines", layer, feature), self._table(model, "throughlines")
        if found is None or table is None or not found.height:
            return None
        own = found.row(0, named=True)
        members = table.filter(pl.col("throughline") == own["throughline"]).sort("layer").collect()
        index = self._reader.index
        return Throughline(
            number=own["throughline"],
            birth=own["birth"],
            death=own["death"],
            family=own.get("family"),
            features=index.name([(model, n, f) for n, f in members.select("layer", "feature").iter_rows()]),
        )

    # ---- pairs of layers

    def transfer(self, metric: str, source: str, target: str) -> TransferAnswer:
        """A result with all its matrices."""
        info = self._info(metric, source, target)
        shape = [len(info.source_layers), len(info.target_layers)]
        with self.open(info) as arrays:
            names = [name for name in arrays.keys() if arrays.get_slice(name).get_shape() == shape]  # noqa: SIM118
            matrices = {name: arrays.get_tensor(name).tolist() for name in names if name != "live"}
        return TransferAnswer(info=info, matrices=matrices)

    def pairs(
        self, source: str, target: str, source_layer: int, target_layer: int, offset: int, limit: int
    ) -> PairPage:
        """Matched features of one cell of `matching`, the best correlated first."""
        info = self._info(MATCHING, source, target)
        row = _place("source layer", source_layer, info.source_layers)
        column = _place("target layer", target_layer, info.target_layers)
        with self.open(info) as arrays:
            cell = self.cell(arrays, row, column)
        page, index = slice(offset, offset + limit), self._reader.index
        sources = index.name([(source, source_layer, f) for f in cell.sources[page].tolist()])
        targets = index.name([(target, target_layer, f) for f in cell.targets[page].tolist()])
        rows = zip(sources, targets, cell.correlations[page].tolist(), strict=True)
        return PairPage(
            total=len(cell.sources),
            offset=offset,
            threshold=cell.threshold,
            num_above=cell.num_above,
            pairs=[Pair(source=a, target=b, correlation=r) for a, b, r in rows],
        )

    @staticmethod
    def cell(arrays: Any, row: int, column: int) -> "Cell":
        """One cell of an open result of `matching`."""
        partner_F = arrays.get_slice("partner")[row, column, :]
        correlation_F = arrays.get_slice("correlation")[row, column, :]
        threshold = float(arrays.get_slice("threshold")[row, column])
        matched = np.flatnonzero((partner_F >= 0) & np.isfinite(correlation_F))
        matched = matched[np.argsort(-correlation_F[matched], kind="stable")]
        num_above = int((correlation_F[matched] > threshold).sum())
        return Cell(matched, partner_F[matched], correlation_F[matched], threshold, num_above)

    def _info(self, metric: str, source: str, target: str) -> TransferInfo:
        infos = self._reader.transfers.get()
        for info in infos:
            if (info.metric, info.source, info.target) == (metric, source, target):
                return info
        known = [f"{info.metric} from {info.source} to {info.target}" for info in infos]
        raise unknown_thing("transfer result", f"{metric} from {source} to {target}", known)

    @contextmanager
    def open(self, info: TransferInfo) -> Iterator[Any]:
        """The arrays of a result, of which parts can be read; the file is checked when it is new."""
        run, key = self._run, (info.metric, info.source, info.target)
        if key not in self._files:
            self._files[key] = Fresh(lambda: run.stamp("transfer"), lambda: run.transfer_file(info))
        with safe_open(self._files[key].get(), framework="numpy") as arrays:
            yield arrays


def _open_table(run: RunDir, model: str, table: str) -> pl.LazyFrame | None:
    """A table of which parts are read: from memory if it is small. None if the run has none."""
    if not run.has_table(model, table):
        return None
    size = run.table_bytes(model, table)
    return run.table(model, table).lazy() if size <= MOST_KEPT_BYTES else run.scan_table(model, table)


def _place(kind: str, layer: int, layers: Sequence[int]) -> int:
    if layer not in layers:
        raise unknown_thing(kind, layer, list(layers))
    return layers.index(layer)
