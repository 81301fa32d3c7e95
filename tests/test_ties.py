"""Equal scores: the lowest index wins, however the work is divided."""

import pytest
import torch

from cliptteacher.inference import upsampled_argmax


@pytest.mark.parametrize("classes", [2, 32, 33, 64, 100])
def test_equal_logits_give_the_first_class_across_chunks(classes: int) -> None:
    logits = torch.zeros(1, classes, 3, 4)
    assert not upsampled_argmax(logits, (6, 8)).any()
    logits[:, -1] = logits[:, classes // 2] = 1  # two winners, in different chunks or in one
    assert (upsampled_argmax(logits, (6, 8)) == classes // 2).all()


def test_a_later_chunk_wins_only_where_it_is_larger() -> None:
    logits = torch.zeros(1, 70, 1, 3)
    logits[0, 5] = torch.tensor([[1.0, 1.0, 1.0]])
    logits[0, 40] = torch.tensor([[1.0, 2.0, 0.0]])
    logits[0, 69] = torch.tensor([[1.0, 2.0, 3.0]])
    assert upsampled_argmax(logits, (1, 3)).tolist() == [[[5, 40, 69]]]
