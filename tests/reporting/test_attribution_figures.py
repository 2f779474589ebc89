import math
import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

from entropy_pl.reporting import (
    AttributedTokens,
    components_figure,
    exchange_rate_figure,
    influence_matrix_figure,
    influence_scatter_figure,
    influence_share_figure,
    top_tokens_figure,
)
from entropy_pl.reporting.attribution_figures import LOWERS, RAISES, drawable

OF_TOKENS = {
    "top": top_tokens_figure,
    "scatter": influence_scatter_figure,
    "matrix": influence_matrix_figure,
    "share": influence_share_figure,
}
HOSTILE = ["$\\nofunction$", "${", "a\nb\x00", "\u202eabc", "中文", "\ud800", "", " ", "x" * 500, "\U000e0001"]


def words(figure):
    return " ".join(text.get_text() for text in figure.texts)


@pytest.fixture(params=OF_TOKENS)
def draw(request):
    return OF_TOKENS[request.param]


def test_width_and_step_are_on_every_figure(tokens, draw):
    figure = draw(tokens())
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    assert any("step 40" in title for title in titles)
    assert figure.canvas.get_width_height()[0] == 900


def test_hostile_texts_are_drawn_as_they_are(tokens, draw, tmp_path):
    batch = tokens(prompts=2, completions=10, length=4)
    for place, index in enumerate(batch.top(len(batch)).tolist()):
        batch.text[index] = HOSTILE[place % len(HOSTILE)]
    batch.prompts[:] = [HOSTILE[i % len(HOSTILE)] for i in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has
        draw(batch).savefig(tmp_path / "a.png")


@pytest.mark.parametrize("others", [{"advantages": None}, {"advantages": None, "sequence_stderr": None}])
def test_what_may_be_missing_may_be_missing(tokens, draw, others, tmp_path):
    draw(tokens(**others)).savefig(tmp_path / "a.png")


def test_a_step_that_moved_nothing_is_drawn(tokens, draw, tmp_path):
    batch = tokens()
    for zeros in (batch.values, batch.sequence_values, batch.sequence_stderr, batch.matrix):
        zeros[:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by zero
        draw(batch).savefig(tmp_path / "a.png")


def test_a_single_token_is_drawn(draw, tmp_path):
    one = np.array([-1e-6])
    batch = AttributedTokens(
        0, 1e-5, "per_sequence", one, one, -one, one, np.zeros(1), np.zeros(1), ["a"], ["p"], one, matrix=one[None]
    )
    draw(batch).savefig(tmp_path / "a.png")


def test_no_tokens_are_said_to_be_none(draw):
    empty = np.zeros(0)
    figure = draw(AttributedTokens(3, 1e-5, "per_token", empty, empty, empty, None, empty, empty, [], [], empty))
    assert "step 3: no " in words(figure)
    assert not figure.axes


def test_no_pyplot_and_no_other_backend(tokens, draw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    backend = matplotlib.rcParams._get("backend")
    draw(tokens()).savefig(tmp_path / "a.pdf")
    assert matplotlib.rcParams._get("backend") == backend


class TestTopTokens:
    def test_bars_are_the_largest_values_in_their_colours(self, tokens):
        batch = tokens()
        (axes,) = top_tokens_figure(batch, count=7).axes
        expected = sorted(batch.values, key=abs, reverse=True)[:7]
        assert [bar.get_width() for bar in axes.patches] == expected
        assert axes.yaxis_inverted()  # the first on top
        for bar, value in zip(axes.patches, expected, strict=True):
            assert to_hex(bar.get_facecolor()).upper() == (LOWERS if value < 0 else RAISES)

    def test_texts_are_no_mathematics_and_controls_are_seen(self, tokens):
        batch = tokens()
        index = int(batch.top(1)[0])
        batch.text[index] = "$x$\n"
        (axes,) = top_tokens_figure(batch, count=1).axes
        (label,) = [text for text in axes.texts if text.get_text() == "$x$⏎"]
        assert not label.get_parse_math()
        (context,) = [text for text in axes.texts if text.get_text() == drawable(batch.context(index, 24))]
        assert not context.get_parse_math()

    def test_values_that_are_no_numbers_are_left_out(self, tokens):
        batch = tokens()
        batch.values[2:] = math.nan
        (axes,) = top_tokens_figure(batch).axes
        assert len(axes.patches) == 2


class TestScatter:
    def test_every_token_is_a_point_of_its_sign(self, tokens):
        batch = tokens(4, 8, 30)
        left, right = influence_scatter_figure(batch).axes
        for axes, column in ((left, batch.logp), (right, batch.advantages)):
            for label, chosen in (("A > 0", batch.advantages > 0), ("A < 0", batch.advantages < 0)):
                (line,) = [line for line in axes.lines if line.get_label() == label]
                assert line.get_xdata().tolist() == column[chosen].tolist()
                assert line.get_ydata().tolist() == batch.values[chosen].tolist()
        assert left.get_yscale() == "symlog"

    def test_the_note_names_where_the_axis_is_linear(self, tokens):
        left, _ = influence_scatter_figure(tokens(4, 8, 30)).axes
        exponent = round(math.log10(left.yaxis.get_transform().linthresh))
        assert f"linear within ±$1\\times 10^{{{exponent}}}$" in left.get_ylabel()

    def test_means_are_of_ten_equal_groups(self, tokens):
        batch = tokens(4, 8, 30)
        left, _ = influence_scatter_figure(batch).axes
        (line,) = [line for line in left.lines if line.get_label() == "mean of a tenth"]
        pairs = sorted(zip(batch.logp, batch.values, strict=True))
        sizes = [len(pairs) // 10 + (group < len(pairs) % 10) for group in range(10)]
        means, start = [], 0
        for size in sizes:
            means.append(sum(value for _, value in pairs[start : start + size]) / size)
            start += size
        np.testing.assert_allclose(line.get_ydata(), means, rtol=1e-9)  # float64 sums in another order

    def test_means_over_values_that_repeat_are_one_each(self, tokens):
        batch = tokens(4, 8, 30)
        advantages = np.where(batch.advantages > 0, 1.0, -0.5)
        _, right = influence_scatter_figure(replace(batch, advantages=advantages)).axes
        (line,) = [line for line in right.lines if line.get_label() == "mean of a tenth"]
        assert list(line.get_xdata()) == [-0.5, 1.0]
        expected = [batch.values[advantages == value].mean() for value in (-0.5, 1.0)]
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-9)  # float64 sums in another order


class TestMatrix:
    def test_image_is_the_matrix_in_another_order_with_its_means_above(self, tokens):
        batch = tokens(3, 4, 20, 8)
        upper, lower = influence_matrix_figure(batch).axes[:2]
        image = lower.images[0].get_array()
        heights = [bar.get_height() for bar in upper.patches]
        # the made-up noise has mean zero over E up to float64 rounding
        np.testing.assert_allclose(image.mean(0), heights, atol=1e-12 * np.abs(batch.matrix).max())
        assert sorted(heights) == sorted(batch.sequence_values.tolist())
        columns = [batch.sequence_values.tolist().index(height) for height in heights]
        rows = sorted(range(8), key=lambda row: batch.matrix[row].mean())
        assert image.tolist() == batch.matrix[rows][:, columns].tolist()
        prompts = [batch.prompts[column] for column in columns]
        assert sum(one != other for one, other in pairwise(prompts)) == 2, "three blocks"
        named = [int(label.get_text()) for label in lower.get_xticklabels()]
        assert [batch.prompts[4 * (number - 1)] for number in named] == prompts[::4]

    def test_colours_are_centred_at_zero(self, tokens):
        image = influence_matrix_figure(tokens()).axes[1].images[0]
        assert image.norm.vmin == -image.norm.vmax < 0

    def test_error_bars_reach_as_far_as_said_and_leave_narrow_bars_alone(self, tokens):
        batch = tokens(3, 4)
        upper = influence_matrix_figure(batch).axes[0]
        (bars,) = [item for item in upper.containers if isinstance(item, BarContainer)]
        heights = [bar.get_height() for bar in bars]
        segments = bars.errorbar.lines[2][0].get_segments()
        for height, segment in zip(heights, segments, strict=True):
            stderr = batch.sequence_stderr[batch.sequence_values.tolist().index(height)]
            np.testing.assert_allclose(np.ptp(segment[:, 1]), 2 * 2.5 * stderr, rtol=1e-9)  # a float64 difference
        assert "± 2.5 SE" in upper.get_ylabel()
        (many,) = influence_matrix_figure(tokens(3, 70)).axes[0].containers
        assert many.errorbar is None

    def test_without_a_matrix(self, tokens):
        assert "no influence of U-completions" in words(influence_matrix_figure(tokens(matrix=None)))


class TestShare:
    def test_bars_add_up_to_the_total_and_its_marks(self, tokens):
        batch = tokens(4, 8, 30)
        figure = influence_share_figure(batch)
        (axes,) = figure.axes
        heights = [[bar.get_height() for bar in container] for container in axes.containers]
        assert len(heights) == 2, "tokens of advantage zero did nothing and have no bars"
        total = math.fsum(batch.values)
        assert math.fsum(height for bars in heights for height in bars) == pytest.approx(total, rel=1e-9)
        (marks,) = [line for line in axes.lines if str(line.get_label()).startswith("together")]
        np.testing.assert_allclose(marks.get_ydata(), np.sum(heights, axis=0), rtol=1e-9)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        positive = math.fsum(batch.values[batch.advantages > 0])
        assert f"A > 0: {positive:+.2e} ± 2e-06 nats ({100 * positive / total:.0f} %)" in labels  # over E
        assert f"together: {total:+.2e} ± 2e-06 nats" in labels


class TestComponents:
    def test_curves_are_of_the_step_taken(self, make_rewarded, make_failed):
        records = [make_rewarded(0), make_failed(5), make_rewarded(10), make_rewarded(15)]
        (axes,) = components_figure(records).axes
        lines = {str(line.get_label()): line for line in axes.lines}
        for label, key in (("momentum", "momentum"), ("tokens", "tokens"), ("whole step", "first_order")):
            (line,) = [line for name, line in lines.items() if name.startswith(label)]
            assert line.get_xdata().tolist() == [0, 10, 15]
            values = [r["attribution"][key]["value"] for r in records if "attribution" in r]
            np.testing.assert_allclose(line.get_ydata(), values, rtol=1e-12)
        remainders = [sum(r["attribution"]["remainder"].values()) for r in records if "attribution" in r]
        np.testing.assert_allclose(lines["remainder"].get_ydata(), remainders, rtol=1e-12)
        band = {tuple(vertex) for item in axes.collections for path in item.get_paths() for vertex in path.vertices}
        low = 1e-4 * (-9.0 - 2.5 * 1.2)  # the record's own interval
        assert any(x == 0 and y == pytest.approx(low, rel=1e-12) for x, y in band)

    @pytest.mark.parametrize("count", [0, 2])
    def test_nothing_attributed(self, make, count):
        figure = components_figure([make(step) for step in range(count)])
        assert f"no probe has attributed an entropy change yet ({count} recorded)" in words(figure)

    def test_one_record(self, make_rewarded, tmp_path):
        components_figure([make_rewarded(3)]).savefig(tmp_path / "a.png")


class TestExchangeRate:
    def test_points_and_rates(self, make_rewarded, make_failed, tmp_path):
        unbounded = {"value": 7.0, "stderr": 9.0, "ci_low": None, "ci_high": None, "bounded": False}
        records = [make_rewarded(0), make_failed(5), make_rewarded(10), make_rewarded(15, exchange_rate=unbounded)]
        figure = exchange_rate_figure(records)
        left, right = figure.axes[:2]
        taken = [next(p for p in r["sweep"] if p["taken"]) for r in records if "sweep" in r]
        points = [[p["reward_true"]["value"], p["true"]["value"]] for p in taken]
        assert left.collections[-1].get_offsets().tolist() == points
        (bars,) = right.containers
        assert bars.lines[0].get_xdata().tolist() == [0, 10]
        assert bars.lines[0].get_ydata().tolist() == [-0.5, -0.5]
        assert [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()] == [[-0.75, -0.25]] * 2
        (crosses,) = [line for line in right.lines if line.get_label() == "interval without bounds"]
        assert crosses.get_xdata().tolist() == [15]
        figure.savefig(tmp_path / "a.png")

    def test_one_long_interval_does_not_flatten_the_others(self, make_rewarded):
        far = {"value": -0.5, "stderr": 9.0, "ci_low": -40.0, "ci_high": 39.0, "bounded": True}
        records = [make_rewarded(0), make_rewarded(5), make_rewarded(10, exchange_rate=far)]
        low, high = exchange_rate_figure(records).axes[1].get_ylim()
        assert (low, high) == (-1.25, 0.25)  # three half-intervals of 0.25 beyond -0.5

    def test_without_rates(self, make_rewarded, tmp_path):
        exchange_rate_figure([make_rewarded(0, exchange_rate=None)]).savefig(tmp_path / "a.png")

    def test_nothing_measured(self, make):
        assert "no probe has measured a change of reward yet (1 recorded)" in words(exchange_rate_figure([make(0)]))
