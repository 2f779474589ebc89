"""A headless browser, and a small run whose pages it opens.

With ``ENTROPY_PL_REQUIRE_BROWSER=1`` a missing browser fails the tests instead of skipping them. ``ENTROPY_PL_RUN``
names a run's folder to open instead of the small one, and ``ENTROPY_PL_SCREENSHOTS`` a folder to write the
documentation's pictures of it to.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import DESKTOP
from tiny import build_model, build_tokenizer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# a browser that does nothing of its own on the network, and needs neither a GPU nor a sandbox
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
CONFIG = Path(__file__).parents[2] / "configs/quickstart.yaml"


def missing(what: str) -> None:
    if os.environ.get("ENTROPY_PL_REQUIRE_BROWSER"):
        pytest.fail(f"{what}, and ENTROPY_PL_REQUIRE_BROWSER is set")
    pytest.skip(what)


@pytest.fixture(scope="module")  # its event loop should not run while others' tests do
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed (extra 'test')")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        missing(f"no browser was found ({', '.join(BROWSERS)})")
    options = [*QUIET, "--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else QUIET
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Opens an address at a size; the page's ``troubles`` are its errors, and ``requests`` what it asked for."""
    contexts = []

    def open_page(address: str, size: tuple[int, int] = DESKTOP, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        page.troubles, page.requests = [], []
        page.on("console", lambda said: page.troubles.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained, probed and attributed: the quickstart, cut down to a tiny policy's."""
    if os.environ.get("ENTROPY_PL_RUN"):
        return Path(os.environ["ENTROPY_PL_RUN"]).absolute()
    from entropy_pl.cli import main

    logging.raiseExceptions = False  # Lightning's log handler outlives a test's captured stderr
    folder = tmp_path_factory.mktemp("demo")
    build_model().save_pretrained(folder / "policy")
    build_tokenizer().save_pretrained(folder / "policy")
    main(
        [
            "fit",
            f"--config={CONFIG}",
            f"--model.policy.name={folder / 'policy'}",
            "--model.num_generations=2",
            "--model.max_new_tokens=6",
            "--model.kl_coefficient=0.1",  # what moves a policy that earns no reward
            "--data.batch_size=2",
            "--probe.every_n_steps=1",
            "--probe.num_sequences=8",
            "--probe.counterfactuals=[entropy_bonus]",
            "--trainer.max_steps=3",
            f"--trainer.logger.init_args.save_dir={folder / 'runs'}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_checkpointing=false",
        ]
    )
    return folder / "runs/quickstart/version_0"


@pytest.fixture(scope="session")
def screenshots() -> Path | None:
    """Where the documentation's pictures go, if they are to be made."""
    folder = os.environ.get("ENTROPY_PL_SCREENSHOTS")
    return None if folder is None else Path(folder).absolute()
