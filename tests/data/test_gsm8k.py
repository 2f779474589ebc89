import json

import pytest

from entropy_pl.data.gsm8k import load_gsm8k


def write_rows(folder, rows, split="train"):
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def load(folder, split="train", size=None):
    return load_gsm8k(split, path=str(folder), size=size, seed=0)


def test_folder(tmp_path):
    write_rows(tmp_path, [{"question": f"Q{i}", "answer": f"2 * {i} #### ${i + 1},200.50"} for i in range(5)])
    examples = load(tmp_path, size=3)
    assert [example.question for example in examples] == ["Q0", "Q1", "Q2"]
    assert [example.answer for example in examples] == ["1200.50", "2200.50", "3200.50"]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a folder with train\.jsonl, got .*nowhere, no such folder"):
        load(tmp_path / "nowhere")


def test_missing_split(tmp_path):
    write_rows(tmp_path, [{"question": "Q", "answer": "#### 1"}])
    with pytest.raises(FileNotFoundError, match=r"expected test\.jsonl in .*, found \['train\.jsonl'\]"):
        load(tmp_path, "test")


def test_missing_columns(tmp_path):
    write_rows(tmp_path, [{"prompt": "Q", "answer": "#### 1"}])
    with pytest.raises(ValueError, match=r"\['question', 'answer'\] in .*, got columns \['answer', 'prompt'\]"):
        load(tmp_path)


def test_answer_without_a_number(tmp_path):
    write_rows(tmp_path, [{"question": "Q", "answer": "#### 1"}, {"question": "Q", "answer": "#### many"}])
    with pytest.raises(ValueError, match=r"'#### <number>', got .* '#### many' in row 1"):
        load(tmp_path)


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match="set dataset_path to a folder"):
        load_gsm8k("train", path=None, size=None, seed=0)


@pytest.mark.parametrize(("split", "rows"), [("train", 7473), ("test", 1319)])
def test_real_data(gsm8k_folder, split, rows):
    examples = load(gsm8k_folder, split)
    assert len(examples) == rows
    assert all(example.question and "," not in example.answer for example in examples)
