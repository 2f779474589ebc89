"""The pages of a run as people see them, on a screen and on a phone."""

from __future__ import annotations

import base64
import re

import pytest
from pages import DESKTOP, PHONE

from entropy_pl.cli import main

SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["screen", "phone"])
SECTIONS = ["What was run", "Reward and entropy", "Entropy change per step", "ΔH against δH₁"]
SECTIONS += ["How far first order reaches", "Effective sample size", "Step sizes"]
SECTIONS += ["Who moved the entropy", "What went wrong", "Time"]
SMALLEST = 12  # pixels


@pytest.fixture(scope="module")
def report(demo_run, tmp_path_factory):
    """The address of the run's report."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    main(["report", str(demo_run), "--output", str(file)])
    return file.as_uri()


def fits(page) -> bool:
    return page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def smallest_text(page) -> float:
    """Pixels of the smallest text that is shown, outside of pictures."""
    return page.evaluate(
        """() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            let least = Infinity;
            while (walker.nextNode()) {
                const around = walker.currentNode.parentElement;
                if (walker.currentNode.data.trim() && around.checkVisibility())
                    least = Math.min(least, parseFloat(getComputedStyle(around).fontSize));
            }
            return least;
        }"""
    )


def picture_text(page, image) -> float:
    """Pixels of the smallest text in a picture: its glyphs are drawn 100 to a point and scaled to the text's size."""
    source, shown = image.evaluate("image => [image.currentSrc, image.clientWidth]")
    drawing = base64.b64decode(source.partition(",")[2]).decode()
    (width,) = re.findall(r'<svg [^>]*viewBox="0 0 ([\d.]+) ', drawing)
    sizes = [100 * float(scale) for scale in re.findall(r"<g [^>]*transform=\"[^\"]*scale\(([\d.]+) -", drawing)]
    assert sizes
    return min(sizes) * shown / float(width)


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report(report, open_page, screenshots, size, scheme):
    page = open_page(report, size, color_scheme=scheme, device_scale_factor=2)
    if screenshots is not None and (size, scheme) == (PHONE, "light"):
        section = page.locator("section", has=page.locator("h2", has_text="Entropy change per step"))
        section.screenshot(path=screenshots / "report_phone.png")
    for fold in page.locator("details").all():
        fold.evaluate("fold => fold.open = true")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.troubles == []
    assert [address for address in page.requests if not address.startswith(("file:", "data:"))] == []
    assert page.locator("h2").all_inner_texts() == SECTIONS
    assert fits(page)
    assert smallest_text(page) >= SMALLEST
    images = page.locator("img").all()
    assert len(images) >= 9  # six over the steps, a sweep, two of the tokens
    for image in images:
        assert image.evaluate("image => image.naturalWidth") > 0
        # a subscript is smaller than its text, and not counted; 0.05 for the rounding of a layout to whole pixels
        assert picture_text(page, image) >= SMALLEST - 0.05, image.get_attribute("alt")
        box = image.bounding_box()
        assert box["width"] > 0.8 * min(size[0], 480)


def test_report_loads_nothing_even_if_it_is_told_to(report, open_page, tmp_path):
    """The page forbids what a text that slipped through would want."""
    evil = '<img src="https://example.org/x.png"><script>window.ran = 1</script>'
    file = tmp_path / "report.html"
    with open(report.removeprefix("file://"), encoding="utf-8") as page:
        file.write_text(page.read().replace("<nav>", f"{evil}<nav>"), encoding="utf-8")
    page = open_page(file.as_uri())
    assert page.evaluate("window.ran") is None
    assert len([trouble for trouble in page.troubles if "Content Security Policy" in trouble]) == 2


@SIZES
def test_attribution_page_tells_of_a_token_that_is_tapped(demo_run, open_page, size):
    file = sorted(demo_run.glob("entropy_probe/attribution/step_*.html"))[-1]
    page = open_page(file.as_uri(), size, has_touch=True)
    assert page.troubles == []
    assert page.requests == [file.as_uri()]
    assert fits(page)
    assert smallest_text(page) >= SMALLEST
    token = page.locator(".text i").first
    page.locator("details:has(.text i)").first.evaluate("fold => fold.open = true")
    shown = "token => getComputedStyle(token, '::after').content"
    assert token.evaluate(shown) == "none"
    token.tap()
    assert token.get_attribute("title") in token.evaluate(shown)
    assert fits(page)
