import json
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from entropy_pl.data import PromptBatch, PromptDataModule


def batches(module):
    return list(module.train_dataloader())


def prompts(module):
    return [prompt for batch in batches(module) for prompt in batch.prompts]


@pytest.fixture
def repetitive_folder(tmp_path):
    """Both splits hold Q0 to Q9 three times over; ``train`` has Q10 to Q19 as well."""
    repeated = [{"question": f"Q{i % 10}", "answer": f"#### {i % 10}"} for i in range(30)]
    more = [{"question": f"Q{i}", "answer": f"#### {i}"} for i in range(10, 20)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, repeated)))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, repeated + more)))
    return str(tmp_path)


def test_batches():
    module = PromptDataModule(u_size=20, e_size=3, batch_size=8)
    module.setup("fit")
    first, second = batches(module)  # the last four prompts make no batch
    assert len(first) == len(second) == 8
    assert all(p.startswith("Question: What is ") and p.endswith("?\nResponse: <think>") for p in first.prompts)
    known = {f"Question: {e.question}\nResponse: <think>": e.answer for e in module.u_examples}
    assert [known[prompt] for prompt in first.prompts] == first.answers
    assert len(module.e_prompts) == len(module.e_examples) == 3


@pytest.mark.parametrize("e_split", ["test", "train"])
def test_e_and_u_are_disjoint(e_split):
    module = PromptDataModule(e_split=e_split, e_size=500, batch_size=16)
    assert len(set(module.e_prompts)) == 500
    assert not set(module.e_prompts) & set(prompts(module))


@pytest.mark.parametrize("e_split", ["test", "train"])
@pytest.mark.parametrize("seed", range(3))
def test_e_and_u_are_disjoint_where_prompts_repeat(repetitive_folder, e_split, seed):
    module = PromptDataModule(
        "gsm8k_r1_template", repetitive_folder, e_split=e_split, e_size=7, batch_size=1, seed=seed
    )
    assert len(set(module.e_prompts)) == 7
    assert not set(module.e_prompts) & set(prompts(module))
    assert set(module.e_prompts) | set(prompts(module)) == {f"Question: Q{i}\nResponse: <think>" for i in range(20)}


def test_more_e_prompts_than_there_are(repetitive_folder):
    module = PromptDataModule("gsm8k_r1_template", repetitive_folder, e_size=11)
    with pytest.raises(ValueError, match=r"at most 10, the distinct prompts in split 'test' of gsm8k.*, got 11"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"u_size": 11}, "at least 11 prompts .*got 10: .* without the 10 E prompts"),
        ({"batch_size": 11}, "at least 11 prompts .*got 10"),
        ({"u_size": 5, "batch_size": 6}, "at least 6 prompts .*got 5: .*change u_size"),
        ({"u_split": "test", "batch_size": 1}, "at least 1 prompts .*got 0"),
    ],
)
def test_more_u_prompts_than_there_are(repetitive_folder, settings, message):
    module = PromptDataModule("gsm8k_r1_template", repetitive_folder, e_size=10, **{"batch_size": 2, **settings})
    with pytest.raises(ValueError, match=message):
        module.setup("fit")


def test_order_depends_on_seed_and_epoch_alone():
    def orders(seed, disturbance):
        loader = PromptDataModule(u_size=50, e_size=1, batch_size=1, seed=seed).train_dataloader()
        result = []
        for _ in range(2):
            torch.manual_seed(disturbance)
            result.append([batch.prompts[0] for batch in loader])
        return result

    first, second = orders(0, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    assert orders(0, 2) == [first, second]
    assert orders(1, 1)[0] != first


def test_resumed_epoch():
    loader = PromptDataModule(u_size=50, e_size=1, batch_size=1).train_dataloader()
    epochs = [[batch.prompts for batch in loader] for _ in range(3)]
    resumed = PromptDataModule(u_size=50, e_size=1, batch_size=1).train_dataloader()
    resumed.sampler.set_epoch(2)  # as Lightning does
    assert [batch.prompts for batch in resumed] == epochs[2]


def test_global_rng_is_left_alone():
    module = PromptDataModule(u_size=20, e_size=3, batch_size=5)
    before = torch.get_rng_state()
    batches(module)
    assert torch.equal(before, torch.get_rng_state())


def test_without_shuffling():
    module = PromptDataModule(u_size=6, e_size=3, batch_size=3, shuffle=False)
    questions = [example.question for example in module.u_examples]
    assert prompts(module) == prompts(module) == [f"Question: {q}\nResponse: <think>" for q in questions]


def shares(processes, **settings):
    """The prompts of each batch of each process, over two epochs."""
    result = []
    for rank in range(processes):
        module = PromptDataModule(**settings)
        module.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
        loader = module.train_dataloader()
        result.append([batch.prompts for _ in range(2) for batch in loader])
    return result


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("u_size", [60, 65, 71])  # five batches of 12, and what does not make another
def test_processes_together_are_where_one_would_be(u_size, shuffle):
    settings = {"u_size": u_size, "e_size": 1, "shuffle": shuffle, "seed": 3}
    (alone,) = shares(1, batch_size=12, **settings)
    together = shares(3, batch_size=4, **settings)
    assert len(alone) == 10
    for whole, *parts in zip(alone, *together, strict=True):
        assert [len(part) for part in parts] == [4, 4, 4]
        assert sorted(chain(*parts)) == sorted(whole)


def test_every_process_needs_a_batch():
    module = PromptDataModule(u_size=11, e_size=1, batch_size=4)
    module.trainer = SimpleNamespace(world_size=3, global_rank=0)
    with pytest.raises(ValueError, match=r"at least 12 prompts .*batch_size=4, 3 processes, u_size=11.*got 11"):
        module.setup("fit")


def test_template_with_braces():
    module = PromptDataModule(prompt_template='{"ask": "{question}"}', e_size=1)
    assert module.e_prompts == ['{"ask": "' + module.e_examples[0].question + '"}']


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "arithmetic"}, "did you mean 'arithmetic_r1_template'"),
        ({"prompt_template": "Q:"}, r"contains \{question\}, got 'Q:'"),
        ({"e_size": 0}, "e_size of at least 1, got 0"),
        ({"u_size": 0}, "u_size of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**settings)


def test_lightning_moves_a_batch():
    batch = PromptBatch(["a"], ["1"])
    assert move_data_to_device(batch, torch.device("cpu")) is batch


def test_gsm8k(gsm8k_folder):
    module = PromptDataModule("gsm8k_r1_template", str(gsm8k_folder), e_size=256, batch_size=8)
    module.setup("fit")
    assert len(module.u_examples) == 7473
    assert len(set(module.e_prompts)) == 256
