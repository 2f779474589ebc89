import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from entropy_pl.reporting import add_margin_charts, delta_entropy_figure, scalars

WITH_MARGINS = {"entropy_probe/entropy", "entropy_probe/delta_h_true", "entropy_probe/delta_h1"}
TAGS = {f"{tag}{end}" for tag in WITH_MARGINS for end in ("", "_ci_low", "_ci_high")} | {
    "entropy_probe/ess_fraction",
    "entropy_probe/eta_star",
    "entropy_probe/eta_star_ci_low",
    "entropy_probe/eta_star_ci_high",
    "entropy_probe/update_norm",
}


def test_scalars_are_of_the_step_taken(make):
    record = make(multipliers=(0.5, 1, 2))
    taken = record["sweep"][1]
    values = scalars(record)
    assert set(values) == TAGS
    assert values["entropy_probe/entropy_ci_low"] == record["entropy"]["ci_low"]
    assert values["entropy_probe/delta_h_true"] == taken["true"]["value"]
    assert values["entropy_probe/delta_h1_ci_high"] == taken["first_order"]["ci_high"]
    assert values["entropy_probe/ess_fraction"] == 200 / 256
    assert values["entropy_probe/eta_star"] == 8e-4


def test_what_is_absent_or_not_finite_is_left_out(make, make_failed):
    assert scalars(make_failed(0)) == {}
    assert scalars({**make_failed(0, "no_movement"), "update_norm": 0.0}) == {"entropy_probe/update_norm": 0.0}
    record = make(
        eta_star=None,
        eta_star_ci_low=None,
        eta_star_ci_high=None,
        update_norm=math.inf,
        entropy={"value": 0.9, "ci_low": math.nan},
        sweep=[],
    )
    assert scalars(record) == {"entropy_probe/entropy": 0.9}


@pytest.fixture
def events(tmp_path, make):
    """The event file of two probes, a layout and a figure, read back."""
    with SummaryWriter(tmp_path) as writer:
        add_margin_charts(writer)
        for step in (0, 5):
            for tag, value in scalars(make(step)).items():
                writer.add_scalar(tag, value, step)
        writer.add_figure("figure", delta_entropy_figure([make()]), 5)
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_and_figure_arrive_in_the_event_file(events):
    assert set(events.Tags()["scalars"]) == TAGS
    assert [event.step for event in events.Scalars("entropy_probe/delta_h1")] == [0, 5]
    (image,) = events.Images("figure")
    assert image.width == 900


def test_layout_has_both_changes_on_one_margin_chart(events):
    assert events.PluginTagToContent("custom_scalars") == {"custom_scalars__config__": b""}
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    drawn = [[(s.value, s.lower, s.upper) for s in chart.margin.series] for chart in category.chart]

    def margins(name):
        tag = f"entropy_probe/{name}"
        return tag, f"{tag}_ci_low", f"{tag}_ci_high"

    assert drawn == [[margins("entropy")], [margins("delta_h_true"), margins("delta_h1")]]
    assert {tag for chart in drawn for series in chart for tag in series} <= TAGS


class TestAttribution:
    """Scalars of attribution, reward, predictors and counterfactuals."""

    def test_reward_is_of_the_step_taken(self, make_rewarded):
        record = make_rewarded(5)
        values = scalars(record)
        taken = record["sweep"][1]
        for tag, key in (("delta_j_true", "reward_true"), ("delta_j1", "reward_first_order")):
            assert values[f"entropy_probe/{tag}"] == taken[key]["value"]
            assert values[f"entropy_probe/{tag}_ci_low"] == taken[key]["ci_low"]
            assert values[f"entropy_probe/{tag}_ci_high"] == taken[key]["ci_high"]

    @pytest.mark.parametrize("bounded", [True, False])
    def test_an_exchange_rate_has_an_interval_only_where_it_has_bounds(self, make_rewarded, bounded):
        rate = {"value": -0.5, "stderr": 0.1, "ci_low": -0.75, "ci_high": -0.25, "bounded": bounded}
        found = {tag for tag in scalars(make_rewarded(exchange_rate=rate)) if "exchange_rate" in tag}
        ends = ("", "_ci_low", "_ci_high") if bounded else ("",)
        assert found == {f"entropy_probe/exchange_rate{end}" for end in ends}

    def test_every_part_has_the_records_own_interval(self, make_rewarded):
        record = make_rewarded(0)
        values = {
            tag.removeprefix("entropy_probe/attribution/"): value
            for tag, value in scalars(record).items()
            if "/attribution/" in tag
        }
        parts = {
            "momentum": (-9, 1.2),
            "weight_decay": (0.5, 0.1),
            "tokens": (-3.25, 0.5),
            "remainder": (-0.25, 0.05),  # -0.5 + 0.125 + 0.0625 + 0.0625
            "first_order": (-12, 1.5),
            "positive_advantage": (-4, 0.6),
            "negative_advantage": (0.75, 0.2),
        }
        expected = {
            f"{name}{end}": 1e-4 * (value + reach * stderr)
            for name, (value, stderr) in parts.items()
            for end, reach in (("", 0), ("_ci_low", -2.5), ("_ci_high", 2.5))
        }
        assert values == pytest.approx(expected, rel=1e-12)  # float64 products in another order

    def test_predictors_are_numbers_or_estimates_with_what_intervals_they_have(self, make_rewarded):
        found = {tag: value for tag, value in scalars(make_rewarded()).items() if "/predictors/" in tag}
        assert found == {
            "entropy_probe/predictors/covariance/pearson": 0.5,
            "entropy_probe/predictors/covariance/pearson_ci_low": 0.25,
            "entropy_probe/predictors/covariance/spearman": 0.4,
            "entropy_probe/predictors/steer/sign_agreement": 0.75,
        }

    def test_counterfactuals_by_name(self, make_rewarded):
        record = make_rewarded()
        values = scalars(record)
        bonus = record["counterfactuals"]["entropy_bonus"]
        prefix = "entropy_probe/counterfactuals"
        for end, key in (("", "value"), ("_ci_low", "ci_low"), ("_ci_high", "ci_high")):
            assert values[f"{prefix}/entropy_bonus/delta_h{end}"] == bonus["true"][key]
            assert values[f"{prefix}/entropy_bonus/delta_j{end}"] == bonus["reward_true"][key]
        assert f"{prefix}/no [momentum]/delta_h" in values
        assert f"{prefix}/no [momentum]/delta_j" not in values

    @pytest.mark.parametrize("key", ["attribution", "exchange_rate", "predictors", "counterfactuals"])
    @pytest.mark.parametrize("empty", [None, {}], ids=["none", "empty"])
    def test_what_is_absent_is_left_out(self, make_rewarded, key, empty):
        tags = scalars(make_rewarded(**{key: empty}))
        assert not [tag for tag in tags if key in tag]
        assert set(tags) >= TAGS

    def test_what_failed_is_left_out(self, make_rewarded):
        record = make_rewarded(predictors={"steer": None}, counterfactuals={"other": None})
        assert not [tag for tag in scalars(record) if "steer" in tag or "other" in tag]

    def test_charts_of_reward_and_counterfactuals_come_when_asked_for(self, tmp_path):
        with SummaryWriter(tmp_path) as writer:
            add_margin_charts(writer, reward=True, counterfactuals=["entropy_bonus", "no [momentum]"])
        accumulator = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
        accumulator.Reload()
        (event,) = accumulator.Tensors("custom_scalars__config__")
        (category,) = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
        drawn = [[series.value.removeprefix("entropy_probe/") for series in c.margin.series] for c in category.chart]
        assert drawn == [
            ["delta_j_true", "delta_j1"],
            ["delta_h_true", "counterfactuals/entropy_bonus/delta_h", "counterfactuals/no [momentum]/delta_h"],
            ["entropy"],
            ["delta_h_true", "delta_h1"],
        ]
        for chart in category.chart:
            for series in chart.margin.series:
                assert (series.lower, series.upper) == (f"{series.value}_ci_low", f"{series.value}_ci_high")
