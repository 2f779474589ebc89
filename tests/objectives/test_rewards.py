import copy

import pytest

from entropy_pl.objectives import RewardSum, available_rewards, get_reward, register_reward, rewards

GOOD = " 37 + 45 = 82 </think> <answer> 82 </answer>"


@pytest.mark.parametrize(
    "completion", [GOOD, "</think><answer>$1,200.50</answer>\n", "a\nb\n</think>\n<answer>\n-3\n</answer>"]
)
def test_format(completion):
    assert get_reward("format")(completion, "0") == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "82",
        "<answer> 82 </answer>",
        " 82 </think> 82",
        " 82 </think> <answer> 82",
        " 82 </think> <answer> eighty-two </answer>",
        " 82 </think> <answer> </answer>",
        " 82 </think> so <answer> 82 </answer>",
        GOOD + " and more",
        GOOD + GOOD,
        "</think>" + GOOD,
        "<think>" + GOOD,
        "<answer> 1 </answer>" + GOOD,
    ],
)
def test_wrong_format(completion):
    assert get_reward("format")(completion, "82") == 0.0


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (GOOD, "82", 1),
        (GOOD, "82.0", 1),
        (GOOD, "83", 0),
        ("<answer>$1,200.</answer> and more", "1200.00", 1),
        ("<answer>0.30</answer>", "0.3", 1),
        ("<answer>0.30000000000000001</answer>", "0.3", 0),  # equal as floats
        ("<answer>82 apples</answer>", "82", 0),
        ("<answer>81</answer><answer>82</answer>", "82", 0),
        ("<answer>__import__('os')</answer>", "82", 0),
        ("the answer is 82", "82", 0),
        ("", "82", 0),
    ],
)
def test_numeric_answer(completion, answer, reward):
    assert get_reward("numeric_answer")(completion, answer) == reward


def test_numeric_answer_needs_a_number():
    with pytest.raises(ValueError, match=r"expected a number as reference answer .*, got 'eighty-two'"):
        get_reward("numeric_answer")(GOOD, "eighty-two")


def test_weighted_sum():
    score = RewardSum(["format", "numeric_answer"], [0.25, 2.0])
    total, parts = score([GOOD, GOOD, "<answer>1</answer>", ""], ["82", "83", "1", "1"])
    assert total.tolist() == [2.25, 0.25, 2.0, 0.0]
    assert {name: part.tolist() for name, part in parts.items()} == {
        "format": [1, 1, 0, 0],
        "numeric_answer": [1, 0, 1, 0],
    }


def test_own_function_and_default_weights():
    def short(completion, answer):
        return len(completion) < 10

    total, parts = RewardSum(["format", short])([GOOD, "x"], ["82", "82"])
    assert total.tolist() == [1, 1]
    assert parts["short"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["formats"],), r"got 'formats'; did you mean 'format'\?"),
        ((["format"], [1, 2]), r"one weight per reward \['format'\], got \[1, 2\]"),
        ((["format"], []), r"one weight per reward \['format'\], got \[\]"),
        ((["format", "format"],), "each once"),
        (([],), "at least one reward"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardSum(*arguments)


def test_bad_calls():
    with pytest.raises(ValueError, match="got 1 completions and 2 answers"):
        RewardSum(["format"])([GOOD], ["82", "82"])
    with pytest.raises(ValueError, match=r"'<lambda>' in \[0, 1\], got nan"):
        RewardSum([lambda completion, answer: float("nan")])([GOOD], ["82"])


def test_register(monkeypatch):
    monkeypatch.setattr(rewards, "_REWARDS", copy.deepcopy(rewards._REWARDS))
    register_reward("always")(lambda completion, answer: 1.0)
    assert "always" in available_rewards()
    with pytest.raises(ValueError, match="'always', which is registered already"):
        register_reward("always")(lambda completion, answer: 0.0)
