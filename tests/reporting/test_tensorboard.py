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
    record = make(eta_star=None, update_norm=math.inf, entropy={"value": 0.9, "ci_low": math.nan}, sweep=[])
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
