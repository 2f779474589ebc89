"""The page of a run: what is on it, what it does with what it should not trust, and how large it gets."""

import base64
import json
import re
from urllib.parse import unquote

import pytest
from pages import HOSTILE, Reader

from entropy_pl.cli import main
from entropy_pl.reporting import RecordWriter, read_run, run_page
from entropy_pl.reporting.visible_text import visible

HEADINGS = [
    "What was run",
    "Reward and entropy",
    "Entropy change per step",
    "ΔH against δH₁",
    "How far first order reaches",
    "Effective sample size",
    "Step sizes",
    "Who moved the entropy",
    "What went wrong",
    "Time",
]
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "section", "p", "ul", "li"}
TAGS |= {"div", "table", "tr", "th", "td", "i", "figure", "picture", "source", "img", "details", "summary", "pre"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "href", "id", "class", "tabindex", "open"}
ATTRIBUTES |= {"media", "srcset", "src", "width", "height", "alt"}


@pytest.fixture
def quick(monkeypatch):
    """Figures are made but not rendered, which takes most of a page's time."""

    def picture(draw, words, *, scrolls=False):
        draw()
        return {
            "wide": {"source": "data:,w", "width": 1, "height": 1},
            "narrow": {"source": "data:,n", "width": 1, "height": 1},
            "words": words,
            "scrolls": scrolls,
        }

    monkeypatch.setattr("entropy_pl.reporting.run_sections.picture", picture)


@pytest.fixture
def page_of(tmp_path):
    """Page of a run with these records, and files by name."""

    def make_page(records, **files):
        folder = tmp_path / "run"
        writer = RecordWriter(folder / "entropy_probe/records.jsonl")
        writer.path.parent.mkdir(parents=True)
        writer.path.touch()
        for record in records:
            writer.write(record)
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
        return run_page(read_run(folder))

    return make_page


def top_token(text, context="so"):
    numbers = {"sequence": 4, "position": 2, "value": -2e-5, "logp": -1.0, "entropy": 0.5, "advantage": -1.25}
    return {"text": text, "context": context, "stderr": None, **numbers}


def full_record(make_rewarded, step, **others):
    record = make_rewarded(step, confidence=0.95, weighting="prefix", seconds={"sampling": 2.0, "total": 3.0})
    record["attribution"]["top_tokens"] = [top_token("eggs")]
    return record | others


@pytest.mark.usefixtures("quick")
def test_everything_that_was_measured_is_there(page_of, make_rewarded, make_failed):
    config = "# lightning.pytorch==2.6.0\nmodel:\n  policy:\n    name: some/policy\ntrainer:\n  max_steps: 40\n"
    records = [full_record(make_rewarded, step) for step in (0, 5, 10)] + [make_failed(15, message="no finite logits")]
    reader = Reader(page_of(records, config_yaml=config))
    assert reader.headings == HEADINGS
    for row in (
        ["policy", "some/policy"],
        ["steps to take", "40"],
        ["probes", "4, of which 3 ok, 1 failed"],
        ["optimizer steps", "0 to 15"],
        ["E-batch", "256 completions, 9000 tokens"],
        ["step sizes η", "learning rate × 0.5, 1, 2"],
        ["entropies are", "in nats per token"],
        ["importance weights", "prefix"],
        ["versions", "lightning.pytorch 2.6.0"],
        ["soeggs", "−2.00e−05", "0.368", "0.5", "−1.25", "5, token 3"],
        ["step 15", "failed", "no finite logits"],
        ["sampling", "2", "6"],
        ["entropy_bonus", "3.00e−04 ± 2.0e−05", "1.350e−03 ± 3.0e−05", "1.50e−03 ± 3.0e−04"],
        ["covariance", "0.50", "0.40", "–", "–"],
    ):
        assert row in reader.rows
    assert "the whole config" in reader.text
    assert "max_steps: 40" in reader.text


@pytest.mark.usefixtures("quick")
def test_the_short_version_counts_what_the_records_say(page_of, make):
    """Steps 0 and 5 lower the entropy clearly, at step 10 it cannot be told; lr is a fifth of the lower end of η*.

    At step 15 the weights have collapsed, and its ΔH counts for nothing.
    """
    unclear = make(10)
    next(p for p in unclear["sweep"] if p["taken"])["true"] |= {"ci_low": -1e-3, "ci_high": 1e-3}
    doubted = make(5, untrustworthy_from=2e-4, warnings=["ΔH must not be used at η = 0.0002."])
    doubted["sweep"][-1]["true"] |= {"trustworthy": False}
    collapsed = make(15)
    for point in collapsed["sweep"]:
        point["true"] |= {"trustworthy": False}
    reader = Reader(page_of([make(0), doubted, unclear, collapsed]))
    assert "Of 3 steps measured, 2 lowered the entropy and 0 raised it, their intervals clear of zero;" in reader.text
    assert "of 1 the sign is not known" in reader.text
    assert "Entropy 0.900 ± 0.020 nats per token before step 0, 0.900 ± 0.020 before step 15" in reader.text
    assert "The learning rate was at most 0.2 times η*" in reader.text
    assert "at least 0.781 of N" in reader.text  # 200 of 256
    assert ["step 5", "ΔH must not be used at η = 0.0002."] in reader.rows
    assert "went wrong, or were skipped" not in reader.text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("wanted", "told"), [(40, True), (6, False)])
def test_a_run_that_ended_early_says_so(page_of, make, wanted, told):
    """Its last record is that of step 5, the sixth."""
    text = Reader(page_of([make(0), make(5)], config_yaml=f"trainer:\n  max_steps: {wanted}\n")).text
    assert ("40 steps were to be taken; the last that records or logs know of is step 5." in text) == told
    assert ("were to be taken" in text) == told


@pytest.mark.usefixtures("quick")
def test_a_config_of_aliases_is_not_written_out(page_of, make):
    """Nine of nine of nine ...: six lines that would be millions of words, and a plain value beside them."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcd", "bcde", strict=True)]
    reader = Reader(page_of([make(0)], config_yaml="\n".join([*lines, "seed_everything: *e", "seed: 7"])))
    assert ["seed", "7"] in reader.rows


@pytest.mark.usefixtures("quick")
def test_a_resumed_run_is_shown_as_it_went_with_every_failure(page_of, make, make_failed):
    reader = Reader(page_of([make(0), make_failed(5), make(10), make(5)]))
    assert ["probes", "2, of which 2 ok"] in reader.rows
    assert ["step 5", "failed", "got NaN in [256, 48]"] in reader.rows


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("which", ["none", "failures", "one"])
def test_runs_with_little_to_show(page_of, make, make_failed, which):
    records = {"none": [], "failures": [make_failed(step) for step in (0, 5)], "one": [make(3)]}[which]
    reader = Reader(page_of(records))
    assert reader.headings == HEADINGS
    assert ("No probe has measured an entropy change." in reader.text) == (which != "one")
    assert (["steps 0, 5", "failed", "got NaN in [256, 48]"] in reader.rows) == (which == "failures")


@pytest.mark.usefixtures("quick")
def test_hostile_texts_come_out_inert(page_of, make_rewarded, make_failed, tokens, tmp_path):
    evil = "".join(HOSTILE)
    record = full_record(make_rewarded, 0, weighting=evil, absent={evil: evil}, predictors={evil: {"pearson": 0.5}})
    record |= {"counterfactuals": {evil: {}}, "seconds": {evil: 1.0}, "versions": {evil: evil}}
    record["attribution"]["top_tokens"] = [top_token(text, context=evil) for text in HOSTILE]
    records = [record, make_failed(5, status=evil, message=evil)]
    folder = tmp_path / "run/entropy_probe/attribution"
    folder.mkdir(parents=True)
    batch = tokens(step=0)
    batch.text[:] = [HOSTILE[i % len(HOSTILE)] for i in range(len(batch))]
    batch.save(folder / "step_000000.npz")
    with open(folder.parent / "records.jsonl", "wb") as file:
        file.write(b"".join(json.dumps(r).encode() + b"\n" for r in records) + HOSTILE[0].encode() + b"\n")
    config = visible(evil).replace("␀", "")  # YAML has no place for some, the rest is anything
    (tmp_path / "run/config.yaml").write_text(f"a: {json.dumps(config)}\n# {HOSTILE[0]}", encoding="utf-8")
    page = run_page(read_run(tmp_path / "run"))
    assert "\x00" not in page
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page)
    page.encode()  # no half of a surrogate pair
    reader = Reader(page)
    assert reader.headings == HEADINGS
    assert reader.tags <= TAGS
    assert reader.attributes <= ATTRIBUTES
    for text in HOSTILE:
        assert [visible(evil) + visible(text), "−2.00e−05", "0.368", "0.5", "−1.25", "5, token 3"] in reader.rows
    assert ["step 5", visible(evil), visible(evil)] in reader.rows
    assert "records.jsonl, line 3 is not a record" in reader.text


@pytest.mark.usefixtures("quick")
def test_a_hostile_folder_of_damaged_tokens_is_named(tmp_path, make_rewarded):
    folder = tmp_path / "a\u202e<b>"
    RecordWriter(folder / "entropy_probe/records.jsonl").write(full_record(make_rewarded, 0))
    (folder / "entropy_probe/attribution").mkdir()
    for ending in ("npz", "html"):
        (folder / f"entropy_probe/attribution/step_000000.{ending}").write_text("no tokens")
    page = run_page(read_run(folder), folder=tmp_path)
    assert "\u202e" not in page
    reader = Reader(page)
    assert reader.tags <= TAGS
    assert "a⟨202E⟩<b>/entropy_probe/attribution/step_000000.npz to be attributed tokens" in reader.text
    [link] = [address for address in reader.addresses if not address.startswith(("#", "data:"))]
    assert (tmp_path / unquote(link)).read_text() == "no tokens"


@pytest.mark.usefixtures("quick")
def test_a_record_of_other_contents_costs_its_section_only(page_of, make):
    impossible = {"tokens": {"value": 1.0}, "top_tokens": [{"logp": 1e6}]}  # a probability that is no float
    with pytest.warns(UserWarning, match="the section 'Who moved the entropy' could not be drawn"):
        reader = Reader(page_of([make(0), make(5, attribution=impossible)]))
    assert reader.headings == HEADINGS
    assert "This could not be drawn from what the records hold: OverflowError" in reader.text
    assert ["probes", "2, of which 2 ok"] in reader.rows


@pytest.mark.usefixtures("quick")
def test_sweeps_and_messages_of_a_long_run_are_counted(page_of, make, make_failed):
    records = [make(step) for step in range(100)]
    records += [make_failed(step, message=f"reason {step}") for step in range(100, 400)]
    reader = Reader(page_of(records))
    assert "8 of 100 sweeps, evenly spread from the first to the last." in reader.text
    assert "The last 200 of 300 messages." in reader.text
    assert "The last 200 of 400 probes." in reader.text


@pytest.mark.slow
def test_a_page_of_a_thousand_probes_is_of_a_size_to_send_and_loads_nothing(page_of, make_rewarded):
    records = [full_record(make_rewarded, step) for step in range(0, 5000, 5)]
    page = page_of(records)
    assert len(page.encode()) < 4.5e6
    assert "Content-Security-Policy" in page
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    reader = Reader(page)
    pictures = [address for address in reader.addresses if not address.startswith("#")]
    assert len(pictures) == 2 * (7 + 8)  # for a screen and a phone: seven over the steps, eight sweeps
    for address in pictures:
        kind, _, content = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        drawing = base64.b64decode(content).decode()
        assert drawing.rstrip().endswith("</svg>")
        assert not re.search(r"""(href|src)=["'](?!#|data:)|url\((?!#)|@import|<script""", drawing)
    assert not re.search(r"""(href|src|srcset)=["'](?!#|data:)|url\(|@import|<script""", page)


@pytest.mark.usefixtures("quick")
def test_a_measurement_has_nothing_over_steps(tmp_path, make_rewarded):
    results = full_record(make_rewarded, 0, kind="measurement", versions={"torch": "2.9"}, timing={"total": 3.0})
    results["config"] = {}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "attribution.html").write_text("")
    reader = Reader(run_page(read_run(tmp_path)))
    assert reader.headings == ["What was run", "Step sizes", "Who moved the entropy", "What went wrong", "Time"]
    assert ["versions", "torch 2.9"] in reader.rows
    assert "attribution.html" in reader.addresses


@pytest.fixture
def run_with_page(tmp_path, make):
    """A run with one page of attributed tokens."""
    probe = tmp_path / "my runs/100 %/entropy_probe"
    RecordWriter(probe / "records.jsonl").write(make(5))
    (probe / "attribution").mkdir()
    (probe / "attribution/step_000005.html").write_text("")
    return probe.parent


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("output", [None, "pages/of/report.html"])
def test_the_command_writes_the_page_and_names_it(run_with_page, tmp_path, capsys, output):
    file = run_with_page / "entropy_probe/report.html" if output is None else tmp_path / output
    main(["report", str(run_with_page), *([] if output is None else ["--output", str(file)])])
    assert capsys.readouterr().out == f"report   {file}\n"
    [link] = [address for address in Reader(file.read_text()).addresses if not address.startswith(("#", "data:"))]
    assert (file.parent / unquote(link)).resolve() == run_with_page / "entropy_probe/attribution/step_000005.html"
    assert not list(file.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "expected a run's folder with entropy_probe/records.jsonl, got nowhere"),
        ([], "expected entropy-pl report RUN_DIR [--output FILE], got other words"),
        (["run", "--out", "x"], "unrecognized arguments: --out x"),
    ],
)
def test_the_command_refuses_in_one_message(capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        main(["report", *words])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_nothing(run_with_page, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("entropy_pl.report.run_page", lambda *_, **__: "page")
    (tmp_path / "taken").mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(run_with_page), "--output", str(tmp_path / "taken")])
    assert exit_.value.code == 2
    assert "taken" in capsys.readouterr().err
    assert not (tmp_path / "taken.tmp").exists()
