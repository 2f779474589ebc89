import re

import pytest

from entropy_pl.data.arithmetic import load_arithmetic

SPLITS = ("train", "validation", "test")


def load(split="train", size=None, seed=0):
    return load_arithmetic(split, path=None, size=size, seed=seed)


def test_answers():
    for example in load():
        a, sign, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", example.question).groups()
        assert int(example.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0


def test_splits_partition_the_questions_whatever_the_seed():
    questions = [{example.question for example in load(split, seed=seed)} for seed, split in enumerate(SPLITS)]
    assert len(set.union(*questions)) == sum(map(len, questions)) == 15_050
    assert len(questions[0]) > 11_000
    assert min(map(len, questions)) > 1_000


def test_seed_sets_the_order():
    assert load(size=20, seed=3) == load(size=20, seed=3) == load(seed=3)[:20]
    assert load(size=20, seed=3) != load(size=20, seed=4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\['train', 'validation', 'test'\], got 'eval'"):
        load("eval")
    with pytest.raises(ValueError, match="no dataset_path"):
        load_arithmetic("train", path="somewhere", size=None, seed=0)
