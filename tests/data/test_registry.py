import copy

import pytest

from entropy_pl.data import PromptExample, available_datasets, get_dataset, register_dataset, registry


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_DATASETS", copy.deepcopy(registry._DATASETS))


def load_spiders(split, *, path, size, seed):
    return [PromptExample("How many legs has a spider?", "8")]


def test_shipped_datasets():
    assert {"arithmetic_r1_template", "gsm8k_r1_template"} <= set(available_datasets())
    assert get_dataset("gsm8k_r1_template").template == "Question: {question}\nResponse: <think>"


def test_unknown_name_gets_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"arithmetic_r1_template.*got 'gsm8k_r1'; did you mean 'gsm8k_r1_template'\?"):
        get_dataset("gsm8k_r1")


@pytest.mark.usefixtures("own_registry")
def test_register():
    assert register_dataset("spiders", template="{question}")(load_spiders) is load_spiders
    assert get_dataset("spiders").load("train", path=None, size=None, seed=0)[0].answer == "8"
    register_dataset("spiders", template="{question}")(load_spiders)  # a module may be imported twice
    with pytest.raises(ValueError, match="got 'spiders', which is registered already"):
        register_dataset("spiders", template="{question}")(lambda split, *, path, size, seed: [])


def test_template_without_a_question():
    with pytest.raises(ValueError, match=r"contains \{question\}, got 'Question:'"):
        register_dataset("spiders", template="Question:")
