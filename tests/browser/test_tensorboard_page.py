"""A run's log in a real TensorBoard, as people see it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

STARTS_WITHIN = 120  # seconds, on a machine that does much else
DRAWN_WITHIN = 60_000  # milliseconds, likewise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def tensorboard(demo_run, tmp_path_factory):
    """The address of a TensorBoard on the run's log."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    words = ["--logdir", str(demo_run.parent), "--host", "127.0.0.1", "--port", str(port), "--load_fast=false"]
    with open(tmp_path_factory.mktemp("tensorboard") / "log", "w+") as log:
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *words], stdout=log, stderr=log)
        try:
            end = time.monotonic() + STARTS_WITHIN
            # it listens before it has read the log
            while '"entropy_probe/eta_sweep"' not in (said := answer(f"{address}/data/plugin/images/tags")):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    pytest.fail(f"expected a TensorBoard at {address}, got {said!r}: {log.read()}")
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait()


def answer(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=STARTS_WITHIN) as response:
            return response.read().decode()
    except (urllib.error.URLError, ConnectionError) as error:
        return str(error)


@pytest.fixture
def open_tab(tensorboard, open_page):
    def open_tab(name: str, **options):
        page = open_page(f"{tensorboard}/#{name}", **options)
        page.set_default_timeout(DRAWN_WITHIN)
        return page

    return open_tab


def corners(line) -> int:
    """Of a line that is drawn."""
    return len(re.findall("[ML]", line.get_attribute("d") or ""))


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["entropy_probe/delta_h_true", "entropy_probe/delta_h1", "entropy_probe/entropy"])
def test_scalars_are_curves(open_tab, demo_run, tag):
    page = open_tab(f"scalars&tagFilter=^{tag}$")
    card = page.locator("tf-scalar-card", has=page.get_by_text(tag, exact=False))
    card.locator("path.line").first.wait_for(state="attached")
    assert card.count() == 1
    page.get_by_text("Ignore outliers in chart scaling").click()  # else a point far from the others is not drawn
    lines = card.locator("path.line")
    end = time.monotonic() + STARTS_WITHIN
    while max(map(corners, lines.all())) != probes_of(demo_run) and time.monotonic() < end:
        page.wait_for_timeout(200)  # the chart moves to its new limits
    assert max(map(corners, lines.all())) == probes_of(demo_run)
    assert page.troubles == []


@pytest.mark.slow
def test_margin_charts_are_on_the_custom_scalars_page(open_tab, demo_run, screenshots):
    page = open_tab("custom_scalars", device_scale_factor=2)
    titles = {  # and how many curves, each with a margin of its own
        "ΔH (true) and δH₁ (first order), nats": 2,
        "Entropy H before the step, nats": 1,
        "ΔJ (true) and δJ₁ (first order), reward": 2,
    }
    page.get_by_text("Ignore outliers in chart scaling").click()  # which cuts off margins
    for title, curves in titles.items():
        card = page.locator("tf-custom-scalar-margin-chart-card", has=page.get_by_text(title, exact=True))
        card.locator("path.area").nth(curves - 1).wait_for(state="attached")
        assert card.locator("path.area").count() == curves
        corners_of = sorted(corners(line) for line in card.locator("path.line").all())
        assert corners_of == [probes_of(demo_run)] * (2 * curves)  # a curve, and the outline of its margin
        for area in card.locator("path.area").all():
            assert area.evaluate("area => area.getBBox().width") > 100
    assert page.troubles == []
    if screenshots is not None:
        page.wait_for_timeout(2000)  # until the charts have moved to their new limits
        boxes = [card.bounding_box() for card in page.locator("tf-custom-scalar-margin-chart-card").all()]
        left, top = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
        right = max(box["x"] + box["width"] for box in boxes)
        bottom = max(box["y"] + box["height"] for box in boxes)
        clip = {"x": left - 8, "y": top - 8, "width": right - left + 16, "height": bottom - top + 8}
        page.screenshot(path=screenshots / "tensorboard.png", clip=clip)


@pytest.mark.slow
def test_figures_are_on_the_images_page(open_tab):
    page = open_tab("images")
    for tag in ("eta_sweep", "attribution/top_tokens", "attribution/influence", "attribution/share"):
        card = page.locator("tf-image-loader", has=page.get_by_text(f"entropy_probe/{tag}", exact=True))
        image = card.locator("img")
        image.wait_for(state="attached")
        page.wait_for_function("image => image.complete", arg=image.element_handle())
        assert image.evaluate("image => image.naturalWidth") == 900
    assert page.troubles == []


def probes_of(run) -> int:
    """How many points a curve should have."""
    from entropy_pl.reporting import latest_per_step, read_records

    records = latest_per_step(read_records(run / "entropy_probe/records.jsonl"))
    return sum(record["status"] == "ok" for record in records)
