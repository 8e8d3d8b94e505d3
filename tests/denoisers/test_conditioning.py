import pytest
import torch

from ltd.denoisers import Conditioning, stack
from ltd.rng import DrawRandom


def text(rows, length, value=1.0):
    return Conditioning(text=torch.full((rows, length, 2), value), text_mask=torch.ones(rows, length, dtype=torch.bool))


def test_where_takes_rows_and_pads_the_shorter_text():
    keep = torch.tensor([True, False, True])
    mixed = text(3, 4).where(keep, text(1, 2, value=7.0))
    assert mixed.text[:, 0, 0].tolist() == [1.0, 7.0, 1.0]
    assert mixed.text_mask.sum(1).tolist() == [4, 2, 4]
    reverse = text(3, 2).where(keep, text(1, 4, value=7.0))
    assert reverse.text.shape == (3, 4, 2) and reverse.text_mask.sum(1).tolist() == [2, 4, 2]


def test_where_fills_what_one_side_lacks_with_nothing():
    keep = torch.tensor([True, False])
    mixed = text(2, 3).where(keep, Conditioning(label=torch.tensor([5])))
    assert mixed.text_mask.sum(1).tolist() == [3, 0]
    assert mixed.label.tolist() == [-1, 5]
    dropped = text(2, 3).where(keep, Conditioning())
    assert dropped.text_mask.sum(1).tolist() == [3, 0] and dropped.label is None


def test_drop_is_a_function_of_the_draw_at_the_given_rate():
    cond, null = text(4000, 1), text(1, 1, value=0.0)
    random = DrawRandom(0, range(4000))
    dropped = cond.drop(0.1, null, random).text[:, 0, 0] == 0
    assert 0.08 < dropped.float().mean() < 0.12
    part = cond.select(slice(7, 9)).drop(0.1, null, DrawRandom(0, [7, 8]))
    assert torch.equal(part.text[:, 0, 0] == 0, dropped[7:9])
    assert cond.drop(0.0, null, random) is cond
    assert (cond.drop(1.0, null, random).text == 0).all()


def test_stack_select_and_repeat():
    joint = stack([text(2, 3), text(1, 5, value=2.0)])
    assert joint.text.shape == (3, 5, 2) and joint.text_mask.sum(1).tolist() == [3, 3, 5]
    assert torch.equal(joint.select(slice(2, 3)).text, text(1, 5, value=2.0).text)
    labels = Conditioning(label=torch.tensor([3, 4]))
    assert labels.repeat(2).label.tolist() == [3, 3, 4, 4]
    assert labels.select(torch.tensor([1, 0])).label.tolist() == [4, 3]
    assert stack([labels, text(1, 2)]).label.tolist() == [3, 4, -1]
    with pytest.raises(ValueError, match="no number of rows"):
        stack([labels, Conditioning()])


def test_to_casts_the_text_only():
    cond = Conditioning(text=text(2, 3).text, text_mask=text(2, 3).text_mask, label=torch.tensor([1, 2]))
    half = cond.to("cpu", torch.bfloat16)
    assert (half.text.dtype, half.text_mask.dtype, half.label.dtype) == (torch.bfloat16, torch.bool, torch.int64)
    assert Conditioning().to("cpu").batch_size is None and cond.batch_size == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": torch.zeros(2, 3, 4)}, "come together"),
        ({"text": torch.zeros(2, 3, 4), "text_mask": torch.ones(2, 4, dtype=torch.bool)}, r"text_mask: got .*\(2, 4\)"),
        ({"text": torch.zeros(2, 3, 4), "text_mask": torch.ones(2, 3)}, "needed bool"),
        ({"label": torch.zeros(2)}, "label: got torch.float32"),
        ({**vars(text(2, 3)), "label": torch.zeros(3, dtype=torch.long)}, "number of rows: .*label.: 3"),
    ],
)
def test_fields_that_do_not_agree_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Conditioning(**fields)
