"""Sketches, traces on disk, how tensors are cut into samples, and what a comparison says first."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.storage import StorageError
from ltd.training.trace import WIDTH, Entry, Sample, Trace, check_target, distances, finish, sketch, sums
from ltd.training.trace_compare import compare
from ltd.training.trace_recorder import _Cut

FACTS: dict[str, Any] = {
    "step": 3,
    "layout": {"processes": 1},
    "config": {"seed": 0},
    "packages": {"torch": "1"},
    "code": {"ltd/a.py": "0"},
    "commit": "abc",
    "row": {"optim/grad_norm": 1.0},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1,), (5, 3), (64,), (7, 11, 13), ((1 << 20) + 5,)])
def test_sketch_distance_is_the_tensors_distance(shape: tuple[int, ...]) -> None:
    a = normal(1, *shape)
    for seed, size in ((1, 1e-5), (2, 0.3)):
        b = a + size * normal(1, *shape, seed=seed)
        true = float((a - b).double().norm() / max(a.double().norm(), b.double().norm()))
        assert distances(sketch(a), sketch(b))[0] == pytest.approx(true, rel=0.35)
    halved = distances(sketch(a), sketch(a * 0.5))[0]
    assert halved == pytest.approx(0.5, rel=0.35)


def test_one_wrong_element_is_seen_wherever_it_is() -> None:
    a = normal(1, 4099)
    for place in range(0, 4099, 41):
        b = a.clone()
        b[0, place] += 0.01
        found = distances(sketch(a), sketch(b))[0]
        assert found == pytest.approx(float(0.01 / a.norm()), rel=1e-3), place


def test_rows_are_sketched_alike_in_any_batch_and_layout() -> None:
    x = normal(5, 8, 6, 10)
    together = sketch(x)
    assert together.shape == (5, WIDTH) and together.dtype == torch.float64
    for row in range(5):
        assert torch.equal(sketch(x[row : row + 1])[0], together[row])
    assert torch.equal(sketch(x.to(memory_format=torch.channels_last)), together)
    assert not torch.equal(sketch(x.flip(2))[0], together[0]), "order matters"


@pytest.mark.parametrize("numel", [77, (1 << 20) + 1000])
def test_parts_of_a_vector_add_up(numel: int) -> None:
    x = normal(1, numel)
    cuts = [0, 5, 5, numel // 2, numel - 3, numel]
    parts = [sums(x[:, a:b], a, numel) for a, b in itertools.pairwise(cuts)]
    assert torch.allclose(finish(torch.stack(parts).sum(0)), sketch(x), rtol=1e-12, atol=1e-9)


def test_repeated_chunks_do_not_cancel() -> None:
    chunk = normal(1 << 20)
    x = torch.cat([chunk, -chunk]).unsqueeze(0)
    assert float(sketch(x)[0, 2:].norm()) == pytest.approx(float(x.double().norm()), rel=0.5)


def test_elements_that_are_not_finite_are_counted() -> None:
    x = normal(1, 100)
    broken = x.clone()
    broken[0, 3], broken[0, 4] = math.nan, math.inf
    assert sketch(broken)[0, 1] == 2
    assert distances(sketch(x), sketch(broken)) == [math.inf]
    assert distances(sketch(broken), sketch(broken)) == [0.0]


def test_zeros_and_small_tensors() -> None:
    zero = torch.zeros(1, 10)
    assert distances(sketch(zero), sketch(zero)) == [0.0]
    assert distances(sketch(zero), sketch(zero + 1e-9)) == [1.0]
    assert distances(sketch(zero), sketch(zero + 1e-9), floor=1.0)[0] < 1e-8


def entry(what: Any, name: str, value: Tensor, draw: int | None = 0, kind: Any = "whole") -> Entry:
    return Entry(what, name, draw, kind, tuple(value.shape), sketch(value.unsqueeze(0))[0])


def trace(**changes: Tensor) -> Trace:
    tensors = {"latents": normal(4), "first": normal(5), "second": normal(6), "late": normal(7), "early": normal(8)}
    tensors |= changes
    entries = [entry("input", "latents", tensors["latents"])]
    entries += [entry("output", name, tensors[name]) for name in ("first", "second")]
    entries += [entry("gradient", name, tensors[name], None) for name in ("late", "early")]
    return Trace(FACTS, [Sample(0, "a", "x.tar", 1.0, 0.5)], entries)


def test_trace_survives_the_disk(tmp_path: Path) -> None:
    original = trace()
    original.facts = {**FACTS, "row": {"optim/grad_norm": math.nan}}
    original.write(tmp_path / "deep" / "t")
    read = Trace.read(tmp_path / "deep" / "t")
    assert torch.equal(read.values, original.values)
    assert read.places == original.places and read.samples == original.samples
    assert read.names("output") == ["first", "second"]
    found = compare(original, read, tolerance=0.0)
    assert found.differences == [] and found.compared["output"] == 2 and found.compared["gradient"] == 2
    assert sorted(p.name for p in (tmp_path / "deep" / "t").iterdir()) == ["sketches.safetensors", "trace.json"]


@pytest.mark.parametrize("name", ["sketches.safetensors", "trace.json"])
def test_damaged_trace_is_named(tmp_path: Path, name: str) -> None:
    trace().write(tmp_path / "t")
    file = tmp_path / "t" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(StorageError, match="t: damaged"):
        Trace.read(tmp_path / "t")


def test_other_folders_are_neither_read_nor_written_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(StorageError, match="is no trace"):
        Trace.read(tmp_path / "run")
    with pytest.raises(ConfigError, match="--trace: .* exists and is no trace"):
        check_target(tmp_path / "run")
    trace().write(tmp_path / "t")
    check_target(tmp_path / "t")
    check_target(tmp_path / "new")


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        (("latents", "first", "late"), "input latents (sample a, draw 0): relative"),
        (("first", "second"), "output of first (sample a, draw 0): relative"),
        (("second", "late"), "output of second (sample a, draw 0): relative"),
        (("late", "early"), "gradient of late: relative"),
        (("early",), "gradient of early: relative"),
    ],
)
def test_first_difference_is_the_first_in_causal_order(changed: tuple[str, ...], first: str) -> None:
    sizes = {"latents": 4, "first": 5, "second": 6, "late": 7, "early": 8}
    other = trace(**{name: normal(sizes[name]) * 1.5 for name in changed})
    found = compare(trace(), other, tolerance=1e-4)
    assert str(found.first).startswith(first)
    assert len({d.what for d in found.beyond() if d.category not in ("norm",)}) == len(changed)
    near = trace(**{name: normal(sizes[name]) * (1 + 1e-6) for name in changed})
    found = compare(trace(), near, tolerance=1e-4)
    assert found.first is None and found.differences


def test_small_gradients_are_compared_on_the_scale_of_all() -> None:
    """A gradient that is zero in truth is all rounding, whatever its own size."""
    found = compare(trace(early=normal(8) * 1e-9), trace(early=-normal(8) * 1e-9), tolerance=1e-4)
    assert found.first is None and found.worst("gradient") is not None
    found = compare(trace(early=normal(8) * 1e-4), trace(early=-normal(8) * 1e-4), tolerance=1e-4)
    assert str(found.first).startswith("gradient of early")


def test_samples_come_before_everything() -> None:
    other = trace(latents=normal(4) * 2)
    other.samples = {0: Sample(0, "b", "x.tar", 1.0, 0.5), 1: Sample(1, "c", "x.tar", 1.0, 0.5)}
    found = compare(trace(), other, tolerance=1e-4)
    assert [str(d) for d in list(found.beyond())[:2]] == [
        "other sample in B: b (sample a, draw 0)",
        "a sample that only B has (sample c, draw 1)",
    ]
    other.samples = {0: Sample(0, "a", "x.tar", 0.0, 0.5)}
    assert str(compare(trace(), other, tolerance=1e-4).first) == "weight 1 in A, 0 in B (sample a, draw 0)"


def test_losses_that_are_not_finite_differ_unless_both_are() -> None:
    a, b = trace(), trace()
    b.samples = {0: Sample(0, "a", "x.tar", 1.0, math.nan)}
    assert str(compare(a, b, tolerance=1e-4).first).startswith("loss 0.5 in A, nan in B")
    a.samples = b.samples
    assert compare(a, b, tolerance=1e-4).differences == []


def test_what_only_one_has_is_told() -> None:
    a, b = trace(), trace()
    for t, name in ((b, "second"), (a, "first")):
        del t.places["output", name]
    found = compare(a, b, tolerance=1e-4)
    assert found.first is None, "compiled blocks are looked at from outside alone"
    assert {"1 outputs that only A has: second", "1 outputs that only B has: first"} <= set(found.notes)
    del b.places["gradient", "late"]
    assert str(compare(a, b, tolerance=1e-4).first) == "1 gradients that only A has: late"


def test_shapes_that_differ_are_a_difference() -> None:
    assert "shape of output of first, [5] in A, [6] in B" in str(
        compare(trace(), trace(first=normal(6)), tolerance=1e-4).first
    )


def test_a_sample_that_left_no_output_is_a_difference() -> None:
    other = trace()
    del other.places["output", "first"][0]
    for pair, holder in (((trace(), other), "A"), ((other, trace()), "B")):
        found = compare(*pair, tolerance=1e-4)
        assert str(found.first) == f"output of first, which only {holder} has (sample a, draw 0)"


def test_traces_of_two_steps_are_refused() -> None:
    other = trace()
    other.facts = {**FACTS, "step": 4}
    with pytest.raises(ConfigError, match="steps 3 and 4"):
        compare(trace(), other, tolerance=1e-4)


def test_notes_say_what_the_two_were_made_with() -> None:
    other = trace()
    other.facts = {
        **FACTS,
        "layout": {"processes": 2},
        "code": {"ltd/a.py": "1"},
        "commit": "def",
        "config": {"seed": 1},
    }
    assert compare(trace(), other, tolerance=1e-4).notes == [
        "layout processes: 1 in A, 2 in B",
        "config seed: 0 in A, 1 in B",
        "commit: abc in A, def in B",
        "code that differs: ltd/a.py",
    ]


class Condition:
    def __init__(self, mask: Tensor) -> None:
        self.text_mask = mask


def cut(sequence: int, *, mask: Tensor, packed: bool = False, lengths: tuple[int, ...] | None = None) -> _Cut:
    made = _Cut([10, 11], sequence)
    made.enter({"x_t": [normal(1)] * 2 if packed else normal(2), "cond": Condition(mask)})
    made.num_tokens, made.lengths = (sum(lengths) if lengths else 7), lengths
    return made


def kinds(rows: Any) -> dict[str, list[tuple[int, ...]]]:
    return {kind: [tuple(row.shape) for row in part] for kind, part in rows}


MASK = torch.tensor([[True, True, False, False], [True, True, True, False]])


def test_token_parts_are_joined_and_padding_is_left_out() -> None:
    made, x = cut(2, mask=MASK[:, :3]), normal(2, 4, 5)
    assert made.is_shared(x) and not made.is_shared(normal(2, 7, 5)) and not made.is_shared(normal(2))
    joined = torch.cat([x, normal(2, 4, 5, seed=1)], 1)
    found = dict(made.rows(x, joined))
    assert torch.equal(found["tokens"], joined[:, :7])
    assert torch.equal(next(cut(1, mask=MASK).rows(joined[:, :7], None))[1], joined[:, :7])


def test_text_as_long_as_a_part_is_compared_as_text() -> None:
    """4 text tokens, 7 tokens in parts of 4: the size does not say which, so both are kept, and the shape decides."""
    text, apart = normal(2, 4, 5), normal(2, 7, 5)
    alone = kinds(cut(1, mask=MASK).rows(text, None))
    shared = kinds(cut(2, mask=MASK).rows(text, torch.cat([text, text], 1)))
    assert alone["text"] == shared["text"] == [(2, 5), (3, 5)]
    assert shared["tokens"] == [(7, 5), (7, 5)] and "tokens" not in alone
    tokens = kinds(cut(1, mask=MASK).rows(apart, None))
    assert tokens == {"tokens": [(7, 5), (7, 5)]}
    rows = {"a": cut(1, mask=MASK).rows(text, None), "b": cut(2, mask=MASK).rows(text, torch.cat([text, text], 1))}
    traces = {
        name: Trace(FACTS, [], [entry("output", "text", row, d, k) for k, part in r for d, row in enumerate(part)])
        for name, r in rows.items()
    }
    assert compare(traces["a"], traces["b"], tolerance=0.0).differences == []


def test_what_all_members_hold_is_not_lost_to_its_size() -> None:
    """A condition whose axis 1 happens to be as long as a part of the tokens, and no text."""
    condition, mask = normal(2, 4, 5), MASK[:, :3]
    joined = torch.cat([condition, condition], 1)
    rows = (cut(1, mask=mask).rows(condition, None), cut(2, mask=mask).rows(condition, joined))
    a, b = (
        Trace(FACTS, [], [entry("output", "condition", row, d, k) for k, part in r for d, row in enumerate(part)])
        for r in rows
    )
    assert compare(a, b, tolerance=0.0).differences == []


def test_packs_are_split_by_their_lengths() -> None:
    made = cut(2, mask=MASK, packed=True, lengths=(3, 6))
    part = normal(1, 5, 8)
    assert made.is_shared(part)
    joined = normal(1, 10, 8)
    found = dict(made.rows(part, joined))
    assert [tuple(row.shape) for row in found["tokens"]] == [(3, 8), (6, 8)]
    assert torch.equal(found["tokens"][1], joined[0, 3:9])
    # 2 + 3 real text tokens: as many as this part has tokens
    assert [tuple(row.shape) for row in found["text"]] == [(2, 8), (3, 8)]
    assert kinds(made.rows(normal(2, 1, 8), None)) == {"whole": [(1, 8), (1, 8)]}
    assert kinds(made.rows([normal(4), normal(5)], None)) == {"whole": [(4,), (5,)]}
