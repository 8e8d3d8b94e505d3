import pytest
import torch

from ltd.nn.packing import Segments, by_sample, mean_by_sample, pack_latents, pack_text, unpack_latents


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("lengths", [(3, 3, 5, 3), (4,), (0, 2, 2, 0, 0, 1), (1, 0, 7)])
def test_by_sample_meets_every_token_with_its_own_samples_vector(lengths):
    x, vectors = draw(1, sum(lengths), 4), draw(len(lengths), 1, 4).requires_grad_()
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    out = by_sample(torch.mul, lengths, [x], [vectors])
    assert torch.equal(out, x * vectors[owners, 0])
    out.square().sum().backward()
    expected = torch.zeros(len(lengths), 4, dtype=torch.float64)
    expected.index_add_(0, owners, (2 * x.square() * vectors.detach()[owners, 0])[0])
    assert torch.allclose(vectors.grad[:, 0], expected, atol=1e-12)


def test_neighbours_of_one_length_are_one_call():
    calls = []

    def spy(x, vector):
        calls.append((tuple(x.shape), tuple(vector.shape)))
        return x

    x = draw(1, 14, 4)
    assert torch.equal(by_sample(spy, (3, 3, 5, 3), [x], [draw(4, 1, 4)]), x)
    assert calls == [((2, 3, 4), (2, 1, 4)), ((1, 5, 4), (1, 1, 4)), ((1, 3, 4), (1, 1, 4))]


def test_latents_come_back_and_positions_start_anew():
    latents = [draw(2, 1, 4, 2), draw(2, 3, 2, 6), draw(2, 1, 2, 2)]
    patches, positions, lengths = pack_latents(latents, (1, 2, 2))
    assert lengths == (2, 9, 1) and patches.shape == (1, 12, 8)
    assert positions[0, :3].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert positions[0, 10:].tolist() == [[2, 0, 2], [0, 0, 0]]
    back = unpack_latents(patches, [tuple(x.shape[1:]) for x in latents], (1, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(back, latents, strict=True))


def test_only_real_text_is_kept_and_a_sample_without_any_keeps_one_zero():
    text, mask = draw(3, 4, 2), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    tokens, lengths, some = pack_text(text, mask)
    assert lengths == (2, 1, 4) and some.tolist() == [[True], [False], [True]]
    assert torch.equal(tokens, torch.cat((text[0, [0, 2]], torch.zeros(1, 2), text[2]))[None])
    means = mean_by_sample(tokens, lengths, some)
    assert torch.allclose(means, torch.stack((text[0, [0, 2]].mean(0), torch.zeros(2), text[2].mean(0))))
    tokens, lengths, some = pack_text(text[::2], mask[::2])
    assert tokens.shape == (1, 6, 2) and lengths == (2, 4) and some is None


def test_segments_that_cannot_be_attended_to_are_refused():
    with pytest.raises(ValueError, match="got 2 blocks of queries, 1 of keys"):
        Segments((1, 2), (3,))
    with pytest.raises(ValueError, match="block 1 has 2 queries and 0 keys"):
        Segments((1, 2), (3, 0))
    with pytest.raises(ValueError, match="block 0 has -1 queries"):
        Segments((-1,), (3,))
    assert Segments((0, 2), (0, 1)).q_lengths == (0, 2)


def test_samples_met_with_their_vectors_leave_no_slice_to_differentiate() -> None:
    # The gradient of each slice would be a tensor of the whole pack.
    x, v = torch.randn(1, 9, 4, requires_grad=True), torch.randn(4, 1, 4, requires_grad=True)
    waiting, seen = [by_sample(lambda x, v: x * v, (2, 2, 0, 5), [x], [v]).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert "SplitWithSizesBackward0" in names and "SliceBackward0" not in names
