"""Registries: every entry loads, unknown names are answered with the nearest, and third parties come in by entry point."""

from importlib.metadata import EntryPoint

import pytest

from throughline import registry
from throughline.errors import InputError
from throughline.models import FAMILIES
from throughline.registry import ARCHITECTURES, FIGURES, LABELERS, METRICS, Registry, unknown

ALL = (ARCHITECTURES, METRICS, LABELERS, FIGURES, FAMILIES)


@pytest.mark.parametrize(
    ("table", "name"), [(t, n) for t in ALL for n in t.built_in], ids=lambda v: getattr(v, "kind", v)
)
def test_every_entry_loads_and_bears_its_name(table, name):
    found = table.load(name)
    if table is not FIGURES:
        assert found.name == name
    assert found.__doc__ or table is FAMILIES


def test_unknown_names():
    assert unknown("model", "phy", ["gpt2", "phi"]) == "model 'phy' is unknown; did you mean 'phi'? (gpt2, phi)"
    assert unknown("model", "zzz", ["gpt2", "phi"]) == "model 'zzz' is unknown; expected one of gpt2, phi"
    with pytest.raises(InputError, match="metric 'machting' is unknown; did you mean 'matching'"):
        METRICS.load("machting")


def test_a_path_of_ones_own_is_loaded():
    assert METRICS.load("throughline.transfer.matching:Matching") is METRICS.load("matching")


@pytest.mark.parametrize("path", ["throughline.transfer.matching:Nothing", "no.such.module:Thing", "throughline:"])
def test_a_path_that_leads_nowhere_is_one_line(path):
    with pytest.raises(InputError, match="cannot be loaded from") as caught:
        METRICS.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [":Thing", ".module:Thing", "throughline.text:"])
def test_a_path_that_is_none_is_one_line(path):
    with pytest.raises(InputError, match="cannot be loaded from") as caught:
        METRICS.load(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_metric_is_refused():
    with pytest.raises(
        InputError, match=r"errors:InputError is no metric: it has no name, across_models, both_ways, comp"
    ):
        METRICS.load("throughline.errors:InputError")


def test_entry_points_extend_and_never_replace(monkeypatch):
    def installed(group):
        value = "throughline.labelers.tokens:Tokens"
        return (
            [EntryPoint(name, value, group) for name in ("mine", "concepts")] if group == "throughline.labelers" else []
        )

    monkeypatch.setattr(registry, "entry_points", installed)
    assert LABELERS.names() == ["concepts", "tokens", "llm", "mine"]
    assert LABELERS.load("mine") is LABELERS.load("tokens")
    assert LABELERS.load("concepts") is not LABELERS.load("mine")
    assert "mine" not in METRICS.names()


def test_nothing_is_imported_before_it_is_asked_for():
    table = Registry("thing", {"broken": "no.such.module:Thing"})
    assert table.names() == ["broken"]
    with pytest.raises(InputError, match="thing 'broken' cannot be loaded"):
        table.load("broken")
