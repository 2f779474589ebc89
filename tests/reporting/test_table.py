import io
import math

import pytest
from rich.console import Console

from entropy_pl.records import Record
from entropy_pl.reporting import attribution_table, probe_table, sweep_table
from entropy_pl.reporting.table import eta_star_shown, with_error


def rendered(records, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(probe_table(records))
    return console.export_text()


def row(text, step):
    line = next(line for line in text.splitlines() if line.split()[:1] == [str(step)])
    return " ".join(line.split())


def test_a_measured_row(make):
    text = rendered([make(0), make(5)])
    assert row(text, 5) == "5 -1.55e-03 ± 2.0e-04 -1.70e-03 ± 1.5e-04 200 0.0005 to 0.002 0.300"
    assert "ESS out of 256" in text
    assert "nats per token" in text
    for head in ("step", "ΔH ± SE", "δH₁ ± SE", "ESS", "η*", "reward"):
        assert head in text


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.031, 0.052, "0.031 to 0.052"), (0.012, None, "≥ 0.012"), (0.0, 3e-5, "≤ 3e-05"), (0.0, None, "–")],
)
def test_eta_star_is_shown_as_its_interval(make, low, high, shown):
    assert eta_star_shown(Record.of(make(0, eta_star_ci_low=low, eta_star_ci_high=high))) == shown


def test_eta_star_of_an_older_record_has_no_interval(make):
    assert eta_star_shown(Record.of(make(0, eta_star_ci_low=None, eta_star_ci_high=None))) == "about 0.0008"


def test_rows_without_measurement_show_status_and_message(make, make_failed):
    text = rendered([make(0), make_failed(5), make_failed(10, "skipped", None)])
    assert row(text, 5) == "5 failed got NaN in [256, 48] – – –"
    assert row(text, 10) == "10 skipped – – –"


def test_a_long_message_wraps_and_numbers_do_not(make, make_failed):
    message = "expected finite logits, got NaN in 3 of 256 sequences; the policy's weights were finite"
    text = rendered([make(100000, reward=-1.25), make_failed(100005, message=message)])
    assert len(row(text, 100000).split()) == 12
    assert all(word in text for word in message.split())
    assert max(map(len, text.splitlines())) <= 100


def test_missing_numbers_are_dashes(make):
    text = rendered(
        [
            make(
                0,
                eta_star=None,
                eta_star_ci_low=None,
                reward=math.nan,
                sweep=[{"eta": 1e-4, "taken": True, "true": {}}],
            )
        ]
    )
    assert row(text, 0) == "0 – – – – –"


def test_a_step_probed_again_shows_once(make, make_failed):
    assert row(rendered([make_failed(5), make(5)]), 5).startswith("5 -1.55e-03")


def test_no_records():
    assert "no probes recorded" in rendered([])


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (-1.23e-3, 4.5e-5, "-1.230e-03 ± 4.5e-05"),
        (-1.23456789e-3, 4.5e-8, "-1.234568e-03 ± 4.5e-08"),
        (1.2e-6, 4.5e-5, "1e-06 ± 4.5e-05"),
        (-1e-9, 4.5e-5, "0e+00 ± 4.5e-05"),
        (9.996e-4, 4.5e-5, "1.000e-03 ± 4.5e-05"),
        (0.0, 9.99e-6, "0e+00 ± 1.0e-05"),
        (123.4, 25.0, "1.23e+02 ± 2.5e+01"),
        (0.5, 0.0, "5.000e-01 ± 0"),
        (0.5, math.nan, "5.000e-01 ± –"),
        (math.nan, 1.0, "–"),
    ],
)
def test_value_and_error_end_at_the_same_decimal_place(value, stderr, expected):
    assert with_error(value, stderr) == expected


class TestSweep:
    def rows(self, record, width=80):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(sweep_table(record))
        return [" ".join(line.split()) for line in console.export_text().splitlines()]

    def test_every_step_size_has_a_row_that_fits_a_terminal(self, make):
        record = make(5)
        lines = self.rows(record)
        for point in record["sweep"]:
            true, predicted = point["true"], point["first_order"]["value"]
            [line] = [line for line in lines if line.startswith(f"{point['eta']:.3g} ")]
            assert f"{true['value'] / predicted - 1:+.2e}" in line
            assert line.endswith(f" {true['ess']:.0f}"), "nothing is cut off at 80 columns"
            assert (" * " in line) == point["taken"]

    def test_caption_tells_entropy_and_the_fitted_slope(self, make):
        record = make(5, kind="measurement", power_law={"slope": 1.0006, "r_squared": 0.9999998})
        text = " ".join(self.rows(record))
        assert f"H = {record['entropy']['value']:.4f} ±" in text
        assert "log-log slope 1.0006, R² 1.000000" in text
        assert "* the step of the learning rate" in text


class TestAttribution:
    def rows(self, record, width=80):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(attribution_table(record))
        return [" ".join(line.split()) for line in console.export_text().splitlines()]

    def test_components_are_of_the_step_taken_with_both_errors_and_their_share(self, make_rewarded):
        rows = self.rows(make_rewarded(0))  # lr = 1e-4, δH₁ = -12 per unit
        assert "Who moved the entropy of optimizer step 0" in rows
        for row in (
            "momentum -9.0e-04 ± 1.2e-04 – 75.0 %",
            "weight decay 5.0e-05 ± 1.0e-05 – -4.2 %",
            "gradient -3.50e-04 ± 6.0e-05 – 29.2 %",
            "tokens -3.25e-04 ± 5.0e-05 8.0e-05 27.1 %",
            "of A > 0 -4.00e-04 ± 6.0e-05 9.0e-05 33.3 %",
            "of A < 0 7.5e-05 ± 2.0e-05 3.0e-05 -6.2 %",
            "remainder -2.50e-05 ± 5.0e-06 – 2.1 %",
            "δH₁ -1.20e-03 ± 1.5e-04 – 100.0 %",
        ):
            assert row in rows
        assert not [row for row in rows if "A = 0" in row], "they carried nothing"
        caption = " ".join(rows)
        assert "entropy term -5.0e-05, gradient 1.3e-05, update 6.3e-06, differences 6.3e-06" in caption

    def test_why_there_is_no_error_over_u(self, make_rewarded):
        record = make_rewarded(0)
        record["attribution"]["over_u"] = {"prompts": 3, "absent": "expected 8 prompts, got 3"}
        for part in (record["attribution"]["tokens"], *record["attribution"]["by_sign"].values()):
            part["stderr_u"] = None
        rows = self.rows(record)
        assert "tokens -3.25e-04 ± 5.0e-05 – 27.1 %" in rows
        assert "no SE over U: expected 8 prompts, got 3" in rows

    def test_counterfactuals_stand_beside_the_step_taken(self, make_rewarded):
        rows = self.rows(make_rewarded(0))
        assert "entropy_bonus 3.00e-04 ± 2.0e-05 1.350e-03 ± 3.0e-05 1.50e-03 ± 3.0e-04" in rows
        assert "no [momentum] -3.00e-04 ± 2.0e-05 7.50e-04 ± 2.0e-05 –" in rows
        assert "step taken -1.05e-03 ± 2.0e-04 – 2.00e-03 ± 4.0e-04" in rows

    def test_long_names_are_folded_and_numbers_stay_whole(self, make_rewarded):
        other = make_rewarded()["counterfactuals"]["entropy_bonus"]
        rows = self.rows(make_rewarded(counterfactuals={"a_very_long_name_of_a_loss_" * 2: other}))
        assert any(row.endswith("3.00e-04 ± 2.0e-05 1.350e-03 ± 3.0e-05 1.50e-03 ± 3.0e-04") for row in rows)
        assert max(map(len, rows)) <= 80

    def test_without_attribution(self, make, make_failed):
        for record in (make(0), make_failed(0), make(0, counterfactuals={"other": None})):
            assert "no attribution recorded" in self.rows(record)
