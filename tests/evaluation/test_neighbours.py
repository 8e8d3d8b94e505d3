import pytest
import torch

from ltd.evaluation.neighbours import NearestDistances, Retrieval, pairwise_distances

GALLERY = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])


def test_distances_are_euclidean():
    got = pairwise_distances(torch.zeros(1, 2), GALLERY)
    assert torch.equal(got, torch.tensor([[0.0, 5.0, 10.0]], dtype=torch.float64))


def test_retrieval_counts_nearest_labels_and_merges():
    queries, labels = torch.tensor([[0.1, 0.0], [2.9, 4.0], [9.0, 0.0], [0.0, 1.0]]), ("a", "a", "b", "b")
    # the nearest are items 0, 1, 2, 0 with labels a, b, a, a: only the first query is right
    whole = Retrieval(GALLERY, ("a", "b", "a"))
    whole.update(queries, labels)
    assert whole.accuracy == 0.25
    assert whole.chance == 0.5
    parts = Retrieval(GALLERY, ("a", "b", "a")), Retrieval(GALLERY, ("a", "b", "a"))
    parts[0].update(queries[:1], labels[:1])
    parts[1].update(queries[1:], labels[1:])
    parts[0].merge(parts[1].state())
    assert parts[0].accuracy == whole.accuracy


def test_nearest_skips_a_querys_own_group_and_merges():
    gallery = NearestDistances(GALLERY, ("x", "x", "y"))
    gallery.update(GALLERY)
    assert gallery.values == [0.0, 0.0, 0.0]
    other = NearestDistances(GALLERY, ("x", "x", "y"))
    other.update(GALLERY, ("x", "x", "y"))
    assert other.values == pytest.approx([10.0, 65**0.5, 65**0.5])
    assert other.median == pytest.approx(65**0.5)
    other.merge(gallery.state())
    assert sorted(other.values) == pytest.approx([0, 0, 0, 65**0.5, 65**0.5, 10.0])


def test_refusals():
    with pytest.raises(ValueError, match="2 labels or more"):
        Retrieval(GALLERY, ("a", "a", "a"))
    with pytest.raises(ValueError, match="label 'z' is not in the gallery"):
        Retrieval(GALLERY, ("a", "b", "a")).update(torch.zeros(1, 2), ("z",))
    with pytest.raises(ValueError, match="NaN"):
        pairwise_distances(torch.full((1, 2), torch.nan), GALLERY)
    with pytest.raises(ValueError, match="whole gallery"):
        NearestDistances(GALLERY, ("x", "x", "x")).update(GALLERY, ("y", "x", "y"))
