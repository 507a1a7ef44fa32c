"""Each figure shows the numbers of its record, at any size, and is saved to the same bytes every time."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from synthetic_run import MODELS, SyntheticModel, make_qualities, make_trace, make_transfer
from throughline.figures import draw_all_models, draw_quality, draw_trace, draw_transfer, save_figure
from throughline.figures.style import color_limits
from throughline.figures.transfer import block_matrix
from throughline.registry import FIGURES
from throughline.study import GateSpec

DRAWINGS: dict[str, Callable[[], Figure]] = {
    "quality": lambda: draw_quality({m.name: make_qualities(m) for m in MODELS}, GateSpec()),
    "transfer": lambda: draw_transfer(make_transfer(MODELS[0], MODELS[0], "matching")),
    "all_models": lambda: draw_all_models([make_transfer(a, b, "matching") for a in MODELS for b in MODELS]),
    "trace": lambda: draw_trace(make_trace(MODELS[0])),
}


def _words(figure: Figure) -> list[str]:
    from matplotlib.text import Text

    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


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


def test_transfer_shows_value_null_and_ceiling_on_one_scale_with_numbers_and_sample():
    result = make_transfer(MODELS[0], MODELS[0], "matching")
    figure = draw_transfer(result)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    for image, name in zip(images, ("value", "null", "ceiling"), strict=True):
        np.testing.assert_array_equal(np.asarray(image.get_array()), result.arrays[name])
        assert image.get_clim() == (0.0, 1.0)
    words = _words(figure)
    assert f"{result.arrays['value'][2, 4]:.2f}" in words
    title = next(word for word in words if "zoo/tall → zoo/tall" in word)
    assert "matching" in title and "n = 50,000 tokens of 400 documents" in title
    assert figure.axes[0].get_ylabel() == "source layer" and figure.axes[0].get_xlabel() == "target layer"


def test_transfer_between_unequal_depths_leaves_out_what_is_not_there():
    result = make_transfer(MODELS[0], MODELS[2], "reconstruction")
    figure = draw_transfer(result)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [np.asarray(image.get_array()).shape for image in images] == [(6, 3), (6, 3)]  # value and null, no ceiling
    assert any("93 % aligned" in word for word in _words(figure))


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
    shown = [feature for layer in trace.layers for feature in layer.features]
    (dots,) = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    effects = np.asarray(dots.get_array())
    assert sorted(effects) == sorted(feature.effect for feature in shown)
    assert dots.get_clim() == (-max(abs(effects)), max(abs(effects)))
    layer = trace.layers[0].features
    by_effect = dict(zip(effects, dots.get_sizes(), strict=True))
    by_activation = sorted(layer, key=lambda feature: feature.activation)
    assert sorted(layer, key=lambda feature: by_effect[feature.effect]) == by_activation
    words = _words(figure)
    assert "·1" in words and "answer" in words and "42" in words  # tokens show their spaces
    strongest = max(shown, key=lambda feature: abs(feature.effect))
    assert strongest.label is None or any(word.startswith(strongest.label.text[:10]) for word in words)


def test_a_wrong_answer_is_said_first_and_dollar_signs_are_not_mathematics():
    trace = make_trace(MODELS[1], correct=False)
    trace = trace.model_copy(update={"tokens": [(0, "$x_$", 0, 1), *trace.tokens[1:]], "prompt": "$a$ $b"})
    words = _words(draw_trace(trace))
    assert any("WRONG, expected “42”: “41” (p = 0.41)" in word for word in words)
    assert "$x_$" in words


def test_figures_need_no_torch_and_no_pyplot():
    code = "import sys, throughline.figures as f; assert not {'torch', 'matplotlib'} & set(sys.modules), 'at import'\n"
    code += "from synthetic_run import *; f.draw_trace(make_trace(MODELS[0]))\n"
    code += "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules), 'at drawing'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
