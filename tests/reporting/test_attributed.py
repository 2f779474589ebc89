import io
import json
import math
import pickle
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest

from entropy_pl.records import to_json
from entropy_pl.reporting import AttributedTokens

SIGNS = {"positive_advantage": 1, "negative_advantage": -1, "zero_advantage": 0}


@pytest.fixture
def nothing():
    empty = np.zeros(0)
    return AttributedTokens(0, 1e-5, "per_token", empty, empty, empty, None, empty, empty, [], [], empty)


def sign_of(advantage):
    return int(advantage > 0) - int(advantage < 0)


def test_shares_by_sign_and_decile_are_those_of_a_loop(tokens):
    batch = tokens(4, 8, 30)
    # a token's decile by counting the less probable ones; no two of these log-probs are equal
    deciles = [10 * sum(other < logp for other in batch.logp) // len(batch) for logp in batch.logp]
    assert batch.deciles().tolist() == deciles
    shares = batch.by_sign_and_decile()
    assert set(shares) == set(SIGNS)
    for name, sign in SIGNS.items():
        for decile in range(10):
            inside = [
                value
                for value, advantage, own in zip(batch.values, batch.advantages, deciles, strict=True)
                if sign_of(advantage) == sign and own == decile
            ]
            assert shares[name]["tokens"][decile] == len(inside)
            # float64 sums in another order
            assert shares[name]["values"][decile] == pytest.approx(sum(inside), rel=1e-9, abs=1e-18)


def test_shares_add_up_to_all_tokens(tokens):
    batch = tokens(4, 8, 30)
    shares = batch.by_sign_and_decile().values()
    assert math.fsum(sum(share["values"]) for share in shares) == pytest.approx(math.fsum(batch.values), rel=1e-9)
    assert sum(sum(share["tokens"]) for share in shares) == len(batch)


@pytest.mark.parametrize("n", [1, 9, 10, 25, 400])
def test_deciles_have_equal_counts_even_of_equal_probabilities(tokens, n):
    zeros = np.zeros(n)
    batch = tokens(
        1, 1, values=zeros, logp=zeros, entropy=zeros, advantages=None, sequence=zeros, position=np.arange(n),
        text=["a"] * n,
    )  # fmt: skip
    counts = np.bincount(batch.deciles(), minlength=10)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1
    assert batch.by_sign_and_decile() == {"all": {"values": [0.0] * 10, "tokens": counts.tolist()}}


def test_top_is_by_size_and_leaves_nan_to_the_end(tokens):
    batch = tokens(1, 2)
    batch.values[3], batch.values[5] = -9.0, math.nan
    order = batch.top(len(batch)).tolist()
    assert order[0] == 3
    assert order[-1] == 5
    sizes = [abs(batch.values[i]) for i in order[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert batch.top(4).tolist() == order[:4]


def test_context_is_what_the_completion_had_before_whatever_the_order_of_tokens(tokens):
    batch = tokens(2, 2, 12)
    shuffled = np.random.default_rng(1).permutation(len(batch))
    names = ("values", "logp", "entropy", "advantages", "sequence", "position")
    mixed = replace(
        batch, text=[batch.text[i] for i in shuffled], **{name: getattr(batch, name)[shuffled] for name in names}
    )
    for index in range(len(mixed)):
        sequence, position = mixed.sequence[index], mixed.position[index]
        words = [
            w
            for w, s, k in zip(batch.text, batch.sequence, batch.position, strict=True)
            if s == sequence and k < position
        ]
        assert mixed.context(index, 10_000) == "".join(words)
        short = mixed.context(index, 5)
        assert len(short) <= 5
        assert "".join(words).endswith(short.removeprefix("…"))


def test_prompts_are_numbered_as_they_come(tokens):
    assert tokens(2, 2).prompt_numbers().tolist() == [0, 0, 1, 1]
    assert replace(tokens(2, 2), prompts=["b", "a", "b", "c"]).prompt_numbers().tolist() == [0, 1, 0, 2]


def test_summary_is_strict_json_of_the_same_numbers(tokens):
    batch = tokens(4, 8, 30)
    summary = json.loads(to_json(batch.summary(count=5)))
    for name, sign in SIGNS.items():
        own = [
            value for value, advantage in zip(batch.values, batch.advantages, strict=True) if sign_of(advantage) == sign
        ]
        assert summary["tokens_by_sign"][name] == len(own)
        by_decile = math.fsum(row[name] for row in summary["by_decile"])
        assert by_decile == pytest.approx(math.fsum(own), rel=1e-9)
    assert {row["stderr"] for row in summary["by_decile"]} == {None}, "said to have none"
    edges = [edge for row in summary["by_decile"] for edge in (row["logp_low"], row["logp_high"])]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (batch.logp.min(), batch.logp.max())
    assert len(summary["top_tokens"]) == 5
    first, index = summary["top_tokens"][0], int(np.abs(batch.values).argmax())
    assert first == {
        "text": batch.text[index],
        "context": batch.context(index),
        "sequence": batch.sequence[index],
        "position": batch.position[index],
        "value": batch.values[index],
        "stderr": None if batch.stderr is None else batch.stderr[index],
        "logp": batch.logp[index],
        "entropy": batch.entropy[index],
        "advantage": batch.advantages[index],
    }


def test_summary_without_advantages_or_tokens(tokens, nothing):
    summary = tokens(advantages=None).summary(1)
    assert summary["tokens_by_sign"] == {}
    assert set(summary["by_decile"][0]) == {"logp_low", "logp_high", "tokens", "all", "stderr"}
    assert summary["top_tokens"][0]["advantage"] is None
    assert to_json(nothing.summary())
    assert nothing.summary()["top_tokens"] == []


def assert_same(one, other):
    for field in fields(AttributedTokens):
        mine, yours = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, yours)
            assert mine.dtype == yours.dtype
        else:
            assert mine == yours, field.name


@pytest.mark.parametrize("absent", [(), ("advantages", "sequence_stderr", "matrix")])
def test_saved_and_loaded_is_the_same(tokens, tmp_path, absent):
    batch = tokens(**dict.fromkeys(absent))
    batch.text[0], batch.text[1], batch.text[2] = "ends in NUL\x00\x00", "\ud800", ""
    batch.values[0] = math.nan
    path = tmp_path / "new" / "tokens.of.step"
    batch.save(path)
    assert_same(batch, AttributedTokens.load(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.of.step"]


def test_a_file_of_the_format_before_is_read(tokens, tmp_path):
    """It lacks error bars by component, and how far those of figures reach."""
    tokens().save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header"))) | {"format": "entropy_pl.attributed_tokens.1"}
    del header["errors"], header["reach"]
    (tmp_path / "old.npz").write_bytes(array_file(header=np.array(json.dumps(header)), **arrays))
    assert_same(replace(tokens(), errors={}, reach=1.0), AttributedTokens.load(tmp_path / "old.npz"))


def test_nothing_at_all_is_saved_and_loaded(nothing, tmp_path):
    nothing.save(tmp_path / "t.npz")
    assert_same(nothing, AttributedTokens.load(tmp_path / "t.npz"))


def array_file(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def bare_array():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def other_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("notes.txt", "hello")
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


FOREIGN = {
    "empty": b"",
    "text": b'{"schema": 1}\n',
    "pickle": pickle.dumps(Bomb()),
    "array": bare_array(),
    "arrays": array_file(values=np.zeros(3)),
    "other zip": other_zip(),
    "other format": array_file(header=np.array(json.dumps({"format": "something.else.2"}))),
    "objects": array_file(header=np.array([Bomb()], dtype=object)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_and_nothing_in_it_is_run(tmp_path, name):
    (tmp_path / "t.npz").write_bytes(FOREIGN[name])
    with pytest.raises(
        ValueError, match=r"expected .*t\.npz to be attributed tokens .*written by AttributedTokens\.save"
    ):
        AttributedTokens.load(tmp_path / "t.npz")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tokens, tmp_path, share):
    path = tmp_path / "t.npz"
    tokens().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="or a part of it"):
        AttributedTokens.load(path)


def test_a_file_whose_content_disagrees_with_itself_is_refused(tokens, tmp_path):
    tokens().save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        arrays = dict(file)
    arrays["values"] = arrays["values"][:-1]
    (tmp_path / "t.npz").write_bytes(array_file(**arrays))
    with pytest.raises(ValueError, match="expected values of shape"):
        AttributedTokens.load(tmp_path / "t.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of attributed tokens .*nowhere"):
        AttributedTokens.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"logp": np.zeros(3)}, r"expected logp of shape \[\d+\] for \d+ token texts, got \[3\]"),
        ({"sequence_values": np.zeros(3)}, r"expected sequence_values of shape \[6\] for 6 prompts, got \[3\]"),
        ({"matrix": np.zeros((8, 3))}, r"expected matrix of shape \[N_E, 6\] for 6 prompts, got \[8, 3\]"),
        ({"unit": "per_word"}, "expected unit to be one of per_token, per_sequence, got 'per_word'"),
        ({"totals": {"luck": 1.0}}, "expected totals among momentum, .*, got luck"),
        ({"errors": {"luck": {}}}, "expected errors among momentum, .*, zero_advantage, got luck"),
        ({"prompts": ["a"], "sequence_values": [0], "sequence_stderr": None, "matrix": None}, "a row of the 1 compl"),
    ],
    ids=["tokens", "sequences", "matrix", "unit", "totals", "errors", "rows"],
)
def test_what_does_not_fit_together_is_refused(tokens, others, message):
    with pytest.raises(ValueError, match=message):
        replace(tokens(), **others)
