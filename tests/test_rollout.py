from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from entropy_pl import Rollout, TokenStats
from entropy_pl.policy.micro_batches import compact
from entropy_pl.rollout import prompt_clusters


def tensors(**changes: object) -> dict[str, Tensor]:
    values = {
        "prompt_ids": [[0, 5], [6, 7], [0, 8]],
        "prompt_mask": [[0, 1], [1, 1], [0, 1]],
        "completion_ids": [[3, 4, 1], [3, 1, 0], [0, 0, 0]],
        "completion_mask": [[1, 1, 1], [1, 1, 0], [0, 0, 0]],
    }
    return {name: torch.tensor(value) for name, value in (values | changes).items()}


def lists(rollout: Rollout) -> list[list[list[int]]]:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return [getattr(rollout, name).long().tolist() for name in names]


class TestRollout:
    def test_lengths_and_masks(self):
        rollout = Rollout(**tensors())
        assert len(rollout) == 3
        assert rollout.prompt_lengths.tolist() == [1, 2, 1]
        assert rollout.completion_lengths.tolist() == [3, 2, 0]
        assert rollout.prompt_mask.dtype == rollout.completion_mask.dtype == torch.bool

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"prompt_ids": [[0, 5, 1], [6, 7, 1], [0, 8, 1]]},
                r"prompt_ids and prompt_mask of one shape \[N, length\], got \[3, 3\] and \[3, 2\]",
            ),
            (
                {"completion_ids": [3, 4], "completion_mask": [1, 1]},
                r"completion_ids and completion_mask of one shape \[N, length\], got \[2\] and \[2\]",
            ),
            (
                {"completion_ids": [[3]], "completion_mask": [[1]]},
                "one completion per prompt row, got 3 prompts and 1 completions",
            ),
            ({"prompt_mask": [[1, 0], [1, 1], [0, 1]]}, "prompts padded on the left: a prompt_mask has False after"),
            (
                {"completion_mask": [[0, 1, 1], [1, 1, 0], [0, 0, 0]]},
                "completions padded on the right: a completion_mask has True after False",
            ),
            ({"completion_mask": [[1, 0, 1], [1, 1, 0], [0, 0, 0]]}, "completions padded on the right"),
            ({"prompt_mask": [[0, 1], [1, 1], [0, 0]]}, "at least one token in every prompt, got a prompt that is all"),
        ],
    )
    def test_what_disagrees_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Rollout(**tensors(**changes))

    @pytest.mark.parametrize("index", [[2, 0], [True, False, True], [1, 1, 1]])
    def test_select(self, index):
        rollout = Rollout(**tensors())
        rows = torch.arange(3)[torch.tensor(index)].tolist()
        selected = rollout.select(torch.tensor(index))
        assert lists(selected) == [[field[row] for row in rows] for field in lists(rollout)]

    def test_select_no_rows(self):
        empty = Rollout(**tensors()).select(torch.zeros(3, dtype=torch.bool))
        assert len(empty) == 0
        assert empty.completion_ids.shape == (0, 3)

    def test_concatenate(self):
        one = Rollout(**tensors())
        other = Rollout(*(torch.tensor(x) for x in ([[7, 8, 9]], [[1, 1, 1]], [[2]], [[1]])))
        both = Rollout.concatenate([one, other])
        assert lists(both) == [
            [[0, 0, 5], [0, 6, 7], [0, 0, 8], [7, 8, 9]],
            [[0, 0, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]],
            [[3, 4, 1], [3, 1, 0], [0, 0, 0], [2, 0, 0]],
            [[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]],
        ]
        assert lists(Rollout.concatenate([one])) == lists(one)

    def test_concatenate_nothing(self):
        with pytest.raises(ValueError, match="at least one rollout to concatenate, got none"):
            Rollout.concatenate([])

    def test_to(self):
        rollout = Rollout(**tensors())
        assert lists(rollout.to("cpu")) == lists(rollout)
        with mock.patch.object(Tensor, "to", return_value=torch.ones(3, 2)) as to:
            rollout.to("cuda:1")  # of which there is none here: all four are sent, whatever happens to them
        assert [call.args for call in to.mock_calls] == [("cuda:1",)] * 4

    def test_frozen(self):
        with pytest.raises(AttributeError):
            Rollout(**tensors()).prompt_ids = torch.zeros(1)


def test_a_rollout_keeps_its_temperature():
    rollout = Rollout(**tensors(), temperature=0.7)
    rows = torch.tensor([0, 2])
    for kept in (rollout.select(rows), rollout.to("cpu"), compact(rollout, rows), Rollout.concatenate([rollout] * 2)):
        assert kept.temperature == 0.7
    # what a process holds whose share is nothing says nothing of the others' temperature
    assert Rollout.concatenate([Rollout.empty(), rollout]).temperature == 0.7
    assert rollout.at_temperature(None) is rollout
    assert rollout.at_temperature(2.0).temperature == 2.0
    with pytest.raises(ValueError, match=r"one temperature to concatenate, got \[0\.7, 1\.0\]"):
        Rollout.concatenate([rollout, Rollout(**tensors())])
    with pytest.raises(ValueError, match="temperature above 0, got inf"):
        rollout.at_temperature(float("inf"))


class TestTokenStats:
    @pytest.mark.parametrize(
        "shapes", [((2, 3), (2, 3), (2, 4)), ((2, 3), (3, 2), (2, 3)), ((6,), (6,), (6,)), ((1, 2, 3),) * 3]
    )
    def test_shapes(self, shapes):
        with pytest.raises(ValueError, match=r"logp, entropy and mask of one shape \[N, T\], got \["):
            TokenStats(*(torch.zeros(shape) for shape in shapes))

    def test_select_and_detach(self):
        logp = torch.arange(6.0).reshape(3, 2).requires_grad_()
        stats = TokenStats(logp, 2 * logp, torch.tensor([[1, 1], [1, 0], [0, 0]]))
        assert len(stats) == 3
        assert stats.mask.dtype == torch.bool
        part = stats.select(torch.tensor([2, 0]))
        assert part.logp.tolist() == [[4, 5], [0, 1]]
        assert part.entropy.tolist() == [[8, 10], [0, 2]]
        assert part.mask.tolist() == [[False, False], [True, True]]
        assert part.logp.requires_grad
        cut = stats.detach()
        assert not cut.logp.requires_grad
        assert not cut.entropy.requires_grad
        assert torch.equal(cut.logp, stats.logp)


def test_prompts_are_the_same_by_their_tokens_and_not_by_their_padding():
    ids = torch.tensor([[7, 5, 6], [9, 5, 6], [7, 5, 6], [4, 4, 4]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]).bool()
    completion = torch.ones(4, 1, dtype=torch.long)
    clusters = prompt_clusters(Rollout(ids, mask, completion, completion.bool())).tolist()
    assert clusters[0] == clusters[1]
    assert len(set(clusters)) == 3
