"""Each figure shows the numbers of its record, at any size, and is saved to the same bytes every time."""

import re
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from synthetic_run import (
    MODELS,
    SyntheticModel,
    make_comparison,
    make_curves,
    make_qualities,
    make_ribbon,
    make_totals,
    make_trace,
    make_transfer,
)
from throughline.figures import (
    draw_all_models,
    draw_best_matches,
    draw_decay,
    draw_divergence,
    draw_persistence,
    draw_quality,
    draw_ribbon,
    draw_trace,
    draw_transfer,
    save_figure,
)
from throughline.figures.comparison import draw_comparison
from throughline.figures.curves import half_life
from throughline.figures.matches import GRID, best_matches, share_at_least
from throughline.figures.ribbons import MOST_BANDS, Flow, band_members
from throughline.figures.style import color_limits, new_figure
from throughline.figures.trace import EDGES_OF_A_BOUNDARY, effect_of, find_lines, place_dots
from throughline.figures.trace_words import representative
from throughline.figures.transfer import block_matrix, varies_by
from throughline.records import Curve, Ribbon
from throughline.registry import FIGURES
from throughline.study import GateSpec

DRAWINGS: dict[str, Callable[[], Figure]] = {
    "quality": lambda: draw_quality({m.name: make_qualities(m) for m in MODELS}, GateSpec()),
    "transfer": lambda: draw_transfer(make_transfer(MODELS[0], MODELS[0], "matching")),
    "all_models": lambda: draw_all_models([make_transfer(a, b, "matching") for a in MODELS for b in MODELS]),
    "trace": lambda: draw_trace(make_trace(MODELS[0])),
    "comparison": lambda: draw_comparison(make_comparison()),
    "divergence": lambda: draw_divergence(make_curves(), num_tokens=50_000, seed=0),
    "decay": lambda: draw_decay(make_curves(), num_tokens=50_000, seed=0),
    "persistence": lambda: draw_persistence(make_curves(), num_tokens=50_000, seed=0),
    "ribbon": lambda: draw_ribbon(make_ribbon(MODELS[0]), num_tokens=50_000, seed=0),
    "best_matches": lambda: draw_best_matches([make_transfer(a, b, "matching") for a in MODELS for b in MODELS]),
}
# 98 layers; the second model's name is longer than there is room for
LARGE = (
    SyntheticModel("gpt2-medium", 24, 8, 80),
    SyntheticModel("EleutherAI/pythia-410m-deduped", 18, 8, 40),
    SyntheticModel("google/gemma-2-2b", 32, 8, 120),
    SyntheticModel("Qwen/Qwen2.5-0.5B", 24, 8, 60),
)
LARGE_DRAWINGS: dict[str, Callable[[], Figure]] = {
    "transfer": lambda: draw_transfer(make_transfer(LARGE[2], LARGE[2], "matching")),
    "transfer reconstruction": lambda: draw_transfer(make_transfer(LARGE[0], LARGE[0], "reconstruction")),
    "all_models": lambda: draw_all_models([make_transfer(a, b, "matching") for a in LARGE for b in LARGE]),
    "all_models reconstruction": lambda: draw_all_models(
        [make_transfer(a, b, "reconstruction") for a in LARGE for b in LARGE]
    ),
    "comparison": lambda: draw_comparison(make_comparison(LARGE)),
    "comparison of many prompts": lambda: draw_comparison(make_totals(LARGE)),
    "divergence": lambda: draw_divergence(make_curves(LARGE), num_tokens=50_000, seed=0),
    "decay": lambda: draw_decay(make_curves(LARGE), num_tokens=50_000, seed=0),
    "persistence": lambda: draw_persistence(make_curves(LARGE), num_tokens=50_000, seed=0),
    "persistence of one model": lambda: draw_persistence(make_curves(LARGE[:1])),
    "ribbon": lambda: draw_ribbon(make_ribbon(SyntheticModel("one/deep", 98, 8, 3000)), num_tokens=50_000, seed=0),
    "best_matches": lambda: draw_best_matches([make_transfer(a, b, "matching") for a in LARGE for b in LARGE]),
    "trace": lambda: draw_trace(make_trace(LARGE[2])),
    "trace of few layers, not verified": lambda: draw_trace(make_trace(MODELS[2], correct=False, verified=False)),
    "best_matches of one model": lambda: draw_best_matches([make_transfer(LARGE[1], LARGE[1], "matching")]),
}


def _words(figure: Figure) -> list[str]:
    from matplotlib.text import Text

    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def _written_over(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of which one lies on the other, and texts that lie partly outside the figure."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    shown: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def note(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            shown.append((self.get_text(), Text.get_window_extent(self, renderer).padded(-0.5)))
        draw(self, renderer, *args, **kwargs)

    figure.canvas.draw()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note)
        figure.canvas.draw()
    assert shown
    found = [(a[0], b[0]) for i, a in enumerate(shown) for b in shown[:i] if a[1].overlaps(b[1])]
    inside = figure.bbox.padded(1)
    return found + [(text, "the edge") for text, box in shown if not _contains(inside, box)]


def _contains(outer: Any, inner: Any) -> bool:
    return bool((outer.min <= inner.min).all() and (inner.max <= outer.max).all())


def _curve(kind: str, value: list[float | None], **more: Any) -> Curve:
    x = [float(i) for i in range(len(value))]
    return Curve.model_validate(
        {"kind": kind, "metric": "matching", "source": "a", "target": "b", "x": x, "value": value, **more}
    )


@pytest.mark.parametrize("name", FIGURES.names())
def test_every_registered_figure_saves_png_svg_and_pdf_with_the_same_bytes(name: str, tmp_path: Path):
    first = save_figure(DRAWINGS[name](), tmp_path / "first" / "a.b")
    second = save_figure(DRAWINGS[name](), tmp_path / "second" / "a.b")
    assert FIGURES.load(name).__name__ == f"draw_{name}"
    assert [path.name for path in first] == ["a.b.png", "a.b.svg", "a.b.pdf"]
    assert first[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<dc:date>" not in first[1].read_bytes()
    assert b"CreationDate" not in first[2].read_bytes() and first[2].read_bytes()[:5] == b"%PDF-"
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix
    assert len(list(first[0].parent.iterdir())) == 3  # nothing temporary is left


def test_images_have_the_same_resolution_in_every_file(tmp_path: Path):
    figure = new_figure(3, 2)
    figure.subplots().imshow(np.arange(6.0).reshape(2, 3), interpolation="nearest")
    _, svg, pdf = save_figure(figure, tmp_path / "a")
    in_svg = re.findall(r"data:image/png;base64,\s*([^\"]+)", svg.read_text())
    widths = [int.from_bytes(b64decode(image)[16:20], "big") for image in in_svg]
    assert len(widths) == 1 and widths[0] > 150  # of 3 inches at 150 dpi
    assert [int(width) for width in re.findall(rb"/Width (\d+)", pdf.read_bytes())] == widths


def test_quality_draws_every_layer_of_every_model_by_relative_depth_and_the_gate():
    qualities = {m.name: make_qualities(m) for m in MODELS}
    figure = draw_quality(qualities, GateSpec(max_fvu=0.44))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for name, layers in qualities.items():
        np.testing.assert_allclose(np.asarray(lines[name].get_ydata()), [q.fvu for q in layers])
        np.testing.assert_allclose(np.asarray(lines[name].get_xdata()), np.linspace(0, 1, len(layers)))
    assert np.asarray(lines["gate"].get_ydata()).tolist() == [0.44, 0.44]
    shares = {line.get_label(): line for line in figure.axes[1].lines}
    np.testing.assert_allclose(
        np.asarray(shares["zoo/wide"].get_ydata()), [q.l0 / q.d_sae for q in qualities["zoo/wide"]]
    )
    assert any("1 of 13 layers fail the gate" in word and "50,000 tokens" in word for word in _words(figure))


def test_quality_says_where_a_text_has_no_answers_and_refuses_nothing():
    figure = draw_quality({MODELS[2].name: make_qualities(MODELS[2])})
    assert "the text has no answers" in _words(figure)
    with pytest.raises(ValueError, match="at least one evaluated layer"):
        draw_quality({"none": []})


@pytest.mark.parametrize("name", LARGE_DRAWINGS)
def test_no_text_of_large_figures_lies_on_another(name: str):
    assert _written_over(LARGE_DRAWINGS[name]()) == []


@pytest.mark.parametrize("name", sorted(DRAWINGS))
def test_no_text_of_small_figures_lies_on_another(name: str):
    assert _written_over(DRAWINGS[name]()) == []


def test_texts_that_lie_on_each_other_or_at_the_edge_are_found():
    figure = draw_decay(make_curves())
    figure.text(0.25, 0.5, "first")
    figure.text(0.25, 0.5, "second")
    figure.text(0.99, 0.05, "third")
    assert _written_over(figure) == [("second", "first"), ("third", "the edge")]


def test_transfer_shows_value_null_and_the_ceiling_of_each_source_layer_on_one_scale_with_numbers_and_sample():
    result = make_transfer(MODELS[0], MODELS[0], "matching")
    figure = draw_transfer(result)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    expected = (result.arrays["value"], result.arrays["ceiling"][:, :1], result.arrays["null"])
    for image, array in zip(images, expected, strict=True):
        np.testing.assert_allclose(np.asarray(image.get_array()), array)
        assert image.get_clim() == (0.0, 1.0)
    words = _words(figure)
    assert {f"{result.arrays['value'][2, 4]:.2f}", f"{result.arrays['ceiling'][5, 0]:.2f}", "ceiling"} <= set(words)
    title = next(word for word in words if "zoo/tall → zoo/tall" in word)
    assert "matching" in title and "n = 50,000 tokens of 400 documents, seed 0" in title and "no ceiling" not in title
    assert figure.axes[0].get_ylabel() == "source layer" and figure.axes[0].get_xlabel() == "target layer"


def test_ceilings_of_target_layers_are_strips_under_the_matrix_and_others_whole_matrices():
    result = make_transfer(MODELS[0], MODELS[0], "reconstruction")
    images = [axes.images[0] for axes in draw_transfer(result).axes if axes.images]
    shown = [np.asarray(image.get_array()) for image in images]
    assert [array.shape for array in shown] == [(6, 6), (1, 6), (1, 6), (6, 6)]
    np.testing.assert_allclose(shown[1][0], result.arrays["ceiling"][0])
    np.testing.assert_allclose(shown[2][0], result.arrays["twin_ceiling"][3])
    result.arrays["ceiling"] = result.arrays["value"] + 0.05
    images = [axes.images[0] for axes in draw_transfer(result).axes if axes.images]
    assert [np.asarray(image.get_array()).shape for image in images] == [(6, 6), (1, 6), (6, 6), (6, 6)]


def test_by_which_layer_an_array_differs():
    column, nan = np.array([[1.0], [2.0]]).repeat(3, axis=1), np.nan
    assert [varies_by(array) for array in (column, column[:, ::-1].T, np.arange(6.0).reshape(2, 3))] == [
        "source",
        "target",
        "both",
    ]
    assert varies_by(np.array([[nan, 1.0], [2.0, nan]])) == "source"
    assert varies_by(np.full((2, 2), nan)) == varies_by(np.ones((2, 2))) == "source"


def test_transfer_between_unequal_depths_leaves_out_what_is_not_there():
    result = make_transfer(MODELS[0], MODELS[2], "reconstruction")
    figure = draw_transfer(result)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [np.asarray(image.get_array()).shape for image in images] == [(6, 3), (6, 3)]  # value and null, no ceiling
    assert any("93 % aligned" in word and "no ceiling" in word for word in _words(figure))


def test_with_more_than_twelve_layers_cells_carry_no_numbers():
    deep = SyntheticModel("deep", 13, 8, 16)
    result = make_transfer(deep, deep, "reconstruction")
    assert not draw_transfer(result).axes[0].texts


def test_color_limits_span_the_values_but_not_the_depths_of_a_bad_reconstruction():
    assert color_limits([np.array([0.2, 0.9]), np.array([np.nan])]) == (0.0, 1.0)
    assert color_limits([np.array([-40.0, 0.9])]) == (-1.0, 1.0)
    assert color_limits([np.array([0.0, 0.02])]) == (0.0, 0.02)
    assert color_limits([]) == (0.0, 1.0)
    assert color_limits([np.array([np.inf, 3.0])]) == (0.0, 3.0)


def test_block_matrix_puts_every_pair_where_it_belongs_and_leaves_gaps_empty():
    results = [
        make_transfer(a, b, "matching") for a in MODELS[:2] for b in MODELS[:2] if (a, b) != (MODELS[1], MODELS[0])
    ]
    matrix = block_matrix(results)
    assert matrix.models == ["zoo/tall", "zoo/wide"] and matrix.bounds.tolist() == [0, 6, 10]
    np.testing.assert_array_equal(matrix.values[:6, 6:], results[1].arrays["value"])
    assert np.isnan(matrix.values[6:, :6]).all()
    image = draw_all_models(results).axes[0].images[0]
    assert np.ma.getmaskarray(np.ma.asarray(image.get_array()))[6:, :6].all()  # drawn in the colour of what is missing
    assert image.cmap.get_bad().tolist() == pytest.approx([0xC8 / 255] * 3 + [1])


def test_all_models_refuses_to_mix_metrics():
    with pytest.raises(ValueError, match="one metric, found matching, reconstruction"):
        draw_all_models([make_transfer(MODELS[0], MODELS[0], m) for m in ("reconstruction", "matching")])


def test_all_models_shows_null_and_ceiling_of_each_layer_on_the_same_scale():
    results = [make_transfer(a, b, "matching") for a in MODELS for b in MODELS]
    figure = draw_all_models(results)
    matrix, null, ceiling = (np.ma.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images)
    assert {axes.images[0].get_clim() for axes in figure.axes if axes.images} == {(0.0, 1.0)}
    assert matrix.shape == (13, 13) and null.shape == ceiling.shape == (13, 1)
    np.testing.assert_allclose(null[:6, 0], np.hstack([r.arrays["null"] for r in results[:3]]).mean(1))
    np.testing.assert_allclose(ceiling[:6, 0], results[0].arrays["ceiling"][:, 0])
    assert any("strips: mean over target layers" in word and "seed 0" in word for word in _words(figure))
    reconstruction = [make_transfer(a, b, "reconstruction") for a in MODELS for b in MODELS]
    figure = draw_all_models(reconstruction)
    strips = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images][1:]
    assert [strip.shape for strip in strips] == [(1, 13)] * 3
    np.testing.assert_allclose(strips[2][0, :6], reconstruction[0].arrays["twin_ceiling"][0])
    assert {"null", "ceiling", "ceiling,\nother seed"} <= set(_words(figure))


def test_all_models_without_a_ceiling_says_so():
    results = [make_transfer(a, b, "matching") for a in MODELS for b in MODELS if a != b]
    assert any("no ceiling" in word for word in _words(draw_all_models(results)))


def test_ninety_eight_layers_are_drawn_with_their_models_names(tmp_path: Path):
    models = [SyntheticModel(f"model-{n}", n, 8, 16 + n) for n in (24, 32, 25, 17)]
    results = [make_transfer(a, b, "reconstruction") for a in models for b in models]
    start = time.perf_counter()
    figure = draw_all_models(results)
    files = save_figure(figure, tmp_path / "all")
    seconds = time.perf_counter() - start
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (98, 98)
    assert {m.name for m in models} <= set(_words(figure))
    assert all(path.stat().st_size > 10_000 for path in files)
    assert seconds < 10, f"{seconds:.1f} s"


def test_trace_has_a_dot_for_every_feature_sized_by_activation_and_coloured_by_effect():
    trace = make_trace(MODELS[0])
    figure = draw_trace(trace)
    (dots,) = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    effects = np.asarray(dots.get_array())
    assert sorted(effects) == sorted(effect_of(feature) for feature in trace.features)
    assert dots.get_clim() == (-max(abs(effects)), max(abs(effects)))
    layer = trace.layers[0].features
    by_effect = dict(zip(effects, dots.get_sizes(), strict=True))
    by_activation = sorted(layer, key=lambda feature: feature.activation)
    assert sorted(layer, key=lambda feature: by_effect[feature.effect]) == by_activation
    words = _words(figure)
    assert {"·1", "answer", "·4", "2", "over ·3", "over 3"} <= set(words)  # tokens show their spaces
    strongest = max(trace.features, key=lambda feature: abs(effect_of(feature)))
    assert strongest.label is None or any(word.startswith(strongest.label.text[:10]) for word in words)


def test_trace_draws_the_strongest_edges_of_every_boundary_relative_to_the_strongest():
    trace = make_trace(MODELS[0])
    lines = find_lines(trace, place_dots(trace))
    for below in range(MODELS[0].num_layers - 1):
        edges = sorted((e for e in trace.edges if e.source[0] == below), key=lambda e: -abs(e.measured or 0))
        drawn = [
            line for line in lines if int(line.start[0] + 0.5) == below and line.end[0] < MODELS[0].num_layers - 0.5
        ]
        assert [line.value for line in drawn] == [edge.measured for edge in edges[:EDGES_OF_A_BOUNDARY]]
        assert not drawn or drawn[0].strength == 1.0
    last = trace.layers[-1].features
    to_answer = [line for line in lines if line.end[0] > MODELS[0].num_layers - 0.5]
    assert sorted(line.value for line in to_answer) == sorted(effect for f in last for effect in f.effects)
    (drawn,) = [
        c
        for c in draw_trace(trace).axes[0].collections
        if isinstance(c, LineCollection) and len(c.get_paths()) == len(lines)
    ]
    widths = np.asarray(drawn.get_linewidth())
    assert np.argsort(widths).tolist() == np.argsort([line.strength for line in lines]).tolist()
    falls = np.asarray(drawn.get_colors())[:, 2] > np.asarray(drawn.get_colors())[:, 0]  # more blue than red
    assert falls.tolist() == [line.value < 0 for line in lines]


def test_traces_chains_are_drawn_with_a_ring_where_they_pass_a_feature_that_is_not_shown():
    trace = make_trace(MODELS[0])
    figure = draw_trace(trace)
    rings = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    hidden = trace.chains[1].steps[0].features[1]
    assert [float(np.asarray(ring.get_ydata())[0]) for ring in rings] == [hidden[1]]
    ends = [np.asarray(line.get_ydata())[-1] for line in figure.axes[0].lines if line.get_marker() != "o"]
    assert ends == pytest.approx([target.position for target in trace.targets])


def test_trace_says_what_was_verified_against_which_nulls():
    words = " ".join(" ".join(_words(draw_trace(make_trace(MODELS[0])))).split())
    for expected in (
        "Off: its value in 'What is 15 + 24?' (carry: 1 becomes 0).",
        "shown features r 0.91 (n = 36), random features r 0.62 (n = 36)",
        "by 0.05 (mean of 18)",
        "edges within a position r 0.97 (n = 40), edges between positions no r (n = 2)",
        "The 64 strongest of 200 nodes keep the answer: faithfulness 0.32 (n = 0: 0.00, random 64: 0.16)",
        "#5 (layers 0-1)",
    ):
        assert expected in words
    bare = " ".join(_words(draw_trace(make_trace(MODELS[0], verified=False))))
    assert "Not verified (--no-verify)" in bare and "predicted change of the answer score" in bare
    assert "not measured" in bare and "r 0.91" not in bare


def test_an_unverified_traces_dots_are_coloured_by_prediction():
    trace = make_trace(MODELS[0], verified=False)
    (dots,) = [c for c in draw_trace(trace).axes[0].collections if isinstance(c, PathCollection)]
    assert sorted(np.asarray(dots.get_array())) == sorted(f.predicted_effect for f in trace.features)


def test_a_curve_that_keeps_no_answer_is_shown_at_its_largest_and_none_is_said():
    found = make_trace(MODELS[0]).verification
    assert found is not None
    lost = [point.model_copy(update={"answer_kept": False}) for point in found.faithfulness]
    assert representative(lost) == lost[-1] and representative([]) is None
    assert representative(found.faithfulness) == found.faithfulness[3]


def test_a_wrong_answer_is_said_first_and_dollar_signs_are_not_mathematics():
    trace = make_trace(MODELS[1], correct=False)
    trace = trace.model_copy(update={"tokens": [(0, "$x_$", 0, 1), *trace.tokens[1:]], "prompt": "$a$ $b"})
    words = _words(draw_trace(trace))
    assert any("WRONG, expected “42”: “41” (p = 0.41)" in word for word in words)
    assert "$x_$" in words


def test_divergence_draws_value_interval_null_and_ceiling_of_every_ordered_pair():
    curves = [curve for curve in make_curves(LARGE) if curve.kind == "divergence"]
    figure = draw_divergence(make_curves(LARGE), num_tokens=50_000, seed=7)
    assert len(curves) == 12 and len(figure.axes) == 4
    for axes, source in zip(figure.axes, LARGE, strict=True):
        own = {curve.target: curve for curve in curves if curve.source == source.name}
        lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
        assert [line.get_label() for line in lines] == list(own)
        for line in lines:
            expected = [np.nan if y is None else y for y in own[str(line.get_label())].value]
            np.testing.assert_array_equal(np.asarray(line.get_ydata()), expected)
        ceilings = [curve.ceiling for curve in own.values() if curve.ceiling]
        dashed = [np.asarray(line.get_ydata()).tolist() for line in axes.lines if line.get_linestyle() == "--"]
        dotted = [np.asarray(line.get_ydata()).tolist() for line in axes.lines if line.get_linestyle() == ":"]
        assert dashed == ceilings and dotted == [curve.null for curve in own.values()]
        assert len(axes.collections) == len(own) + len(ceilings)  # bands
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] == pytest.approx(1.03)
    words = _words(figure)
    assert any("n = 100 to 410 features a point, 50,000 tokens, seed 7" in word for word in words)
    assert sum("no ceiling" in word for word in words) == 1  # the first pair has none
    assert any(word.startswith("ceiling: the source layer against a dictionary of it") for word in words)


def test_curves_without_ceiling_null_or_any_value():
    words = _words(draw_divergence([_curve("divergence", [0.5, None, 0.4], ceiling=[None] * 3)]))
    assert not any(word.startswith("ceiling") for word in words)  # in the legend
    assert "no null; no ceiling (no dictionary from another seed)" in words
    assert not any("seed 0" in word or "n = " in word for word in words)  # nothing is known of them
    with pytest.raises(ValueError, match="a curve of kind decay with a value, found none"):
        draw_decay([_curve("decay", [None, None]), _curve("divergence", [0.1])])


def test_decay_has_a_panel_a_metric_and_says_what_lies_below_its_axis():
    curves = make_curves(MODELS)
    figure = draw_decay(curves, num_tokens=50_000, seed=0)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["matching", "reconstruction"]
    expected = {c.source: c.value for c in curves if (c.kind, c.metric) == ("decay", "reconstruction")}
    shown = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in figure.axes[1].lines}
    assert {name: shown[name] for name in expected} == expected
    assert figure.axes[1].get_ylim()[0] < min(y for y in expected["zoo/tall"] if y is not None) < 0
    deep = draw_decay([_curve("decay", [0.9, -40.0])])
    assert deep.axes[0].get_ylim()[0] > -1.2
    assert any("points below -1 are not shown" in word for word in _words(deep))


def test_persistence_marks_where_half_are_left():
    falling = _curve("persistence", [1.0, 0.8, None, 0.4, 0.6, 0.1])
    assert half_life(falling) == pytest.approx(1 + 2 * 0.3 / 0.4)
    assert half_life(_curve("persistence", [1.0, 0.5])) == 1
    assert half_life(_curve("persistence", [1.0, 0.9])) is half_life(_curve("persistence", [0.4, 0.1])) is None
    lasting = _curve("persistence", [1.0, 0.9], source="c")
    brief = _curve("persistence", [0.4, 0.1], source="d")
    figure = draw_persistence([falling, lasting, brief], seed=3)
    ring = next(line for line in figure.axes[0].lines if line.get_label() == "_half-life")
    assert np.asarray(ring.get_xydata()).tolist() == [[half_life(falling), 0.5]]
    words = _words(figure)
    for expected in (
        "a: half-life 2.5 layers",
        "c: more than half alive at 1 layers",
        "d: no more than half alive at 0 layers",
    ):
        assert expected in words
    assert any(word.endswith("seed 3") for word in words)


def test_a_ribbons_bands_are_as_high_as_throughlines_are_alive():
    ribbon = Ribbon(model="m", layers=[2, 3, 5], alive=[[10, 6, 1], [0, 3, 3], [0, 0, 4]])
    flow = Flow.of(ribbon)
    assert flow.live.tolist() == [10, 9, 8]
    assert flow.births.tolist() == [10, 3, 4] and flow.deaths.tolist() == [4, 5, 0]
    figure = draw_ribbon(ribbon, num_tokens=100, seed=1)
    above, below = figure.axes
    for band, births in zip(above.collections, ribbon.alive, strict=True):
        (path,) = band.get_paths()
        for place, height in enumerate(births):
            ys = [y for x, y in np.asarray(path.vertices) if abs(x - place) < 0.2]
            assert max(ys) - min(ys) == height
    heights = [bar.get_height() for bar in below.patches]
    assert heights == [10, 3, 4, -4, -5, 0]
    words = _words(figure)
    assert {"10", "9", "8", "born here", "last layer", "layer 5"} <= set(words)
    assert any("n = 17 throughlines, 100 tokens, seed 1" in word for word in words)
    with pytest.raises(ValueError, match="expected layers of m, found none"):
        draw_ribbon(Ribbon(model="m", layers=[], alive=[]))


def test_ninety_eight_layers_of_birth_are_twelve_bands_of_consecutive_ones():
    bands = band_members(98)
    assert len(bands) == MOST_BANDS and [layer for band in bands for layer in band] == list(range(98))
    assert {len(band) for band in bands} == {8, 9}
    assert [len(band) for band in band_members(5)] == [1] * 5
    figure = draw_ribbon(make_ribbon(SyntheticModel("deep", 98, 8, 3000)))
    assert len(figure.axes[0].collections) == MOST_BANDS
    assert "layers 0-7" in _words(figure)
    assert len(draw_ribbon(make_ribbon(SyntheticModel("flat", 1, 8, 30))).axes[0].collections) == 1


def test_best_matches_are_of_neighbours_within_a_model_and_of_the_best_layer_of_another():
    within, across = (make_transfer(MODELS[0], other, "matching") for other in MODELS[:2])
    correlation, live = within.arrays["correlation"], within.arrays["live"]
    own = [correlation[i, j][live[i]] for i in range(6) for j in range(6) if abs(i - j) == 1]
    np.testing.assert_array_equal(np.sort(best_matches(within).real), np.sort(np.concatenate(own)))
    best = best_matches(across)
    expected = across.arrays["chance"].max(axis=1)[across.arrays["live"]]
    np.testing.assert_array_equal(np.sort(best.chance), np.sort(expected))
    assert (best.threshold, best_matches(within).ceiling) == pytest.approx((0.2, 0.7)) and np.isnan(best.ceiling)
    figure = draw_best_matches([within, across])
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in figure.axes[1].lines}
    np.testing.assert_array_equal(lines["found"], share_at_least(best.real))
    assert lines["found"][100] == (best.real >= GRID[100]).mean()
    title = "zoo/tall → zoo/wide\n" + f"n = {len(best.real):,} features; no ceiling"
    assert figure.axes[1].get_title(loc="left") == title
    words = _words(figure)
    assert "no ceiling: no dictionary from another seed" in words
    assert any("n = 50,000 tokens, seed 0" in word for word in words)


def test_ceilings_of_several_seeds_are_drawn_with_their_range():
    result, other = (make_transfer(MODELS[0], MODELS[0], metric) for metric in ("matching", "reconstruction"))
    for name, of in (("ceiling", result), ("ceiling_correlation", result), ("twin_ceiling", other)):
        mean = of.arrays[name]
        of.arrays.update({f"{name}_min": mean - 0.03, f"{name}_max": mean + 0.01, "num_twins": np.full(mean.shape, 3)})
    for draw, given in ((draw_transfer, result), (draw_all_models, [result])):
        assert any("ceiling: mean of 3 seeds, at most 0.04 apart" in word for word in _words(draw(given)))
    assert any("ceiling of other seeds: mean of 3 seeds, at most 0.04" in word for word in _words(draw_transfer(other)))
    best = best_matches(result)
    assert (best.ceiling_min, best.ceiling_max) == pytest.approx((0.67, 0.71))
    assert "range over several other seeds" in _words(draw_best_matches([result]))
    ends = {"ceiling": [0.8] * 3, "ceiling_min": [0.7] * 3, "ceiling_max": [0.9] * 3, "num_twins": 3}
    figure = draw_decay([_curve("decay", [0.5, 0.4, 0.3], **ends)])
    assert any(word.endswith("mean of 3 seeds, band: their range") for word in _words(figure))
    bands = [c.get_paths()[0].get_extents().intervaly for c in figure.axes[0].collections]  # pyright: ignore[reportAttributeAccessIssue]
    assert any(band == pytest.approx([0.7, 0.9]) for band in bands)


def test_best_matches_of_what_has_none():
    one = SyntheticModel("flat", 1, 8, 16)
    assert "one layer has no neighbours" in _words(draw_best_matches([make_transfer(one, one, "matching")]))
    with pytest.raises(ValueError, match="a result of matching with correlations by feature, found none"):
        draw_best_matches([make_transfer(MODELS[0], MODELS[0], "reconstruction")])


def test_figures_need_no_torch_and_no_pyplot():
    code = "import sys, throughline.figures as f; assert not {'torch', 'matplotlib'} & set(sys.modules), 'at import'\n"
    code += "from synthetic_run import *; f.draw_trace(make_trace(MODELS[0]))\n"
    code += "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules), 'at drawing'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
