import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention

from ltd.nn import attention
from ltd.nn.attention import CrossAttention, SelfAttention, attend, attend_repeated, available_backends, select_backend
from ltd.nn.packing import Repeats, Segments
from ltd.nn.rope import rope_tables

F64 = torch.float64


def naive(q, k, v, key_mask=None):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def qkv(n=5, m=7, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, size, 3, 8, dtype=dtype, requires_grad=True) for size in (n, m, m)]


def test_attend_equals_the_formula():
    assert torch.allclose(attend(*qkv()), naive(*qkv()), atol=1e-12)


def test_masked_keys_have_no_influence():
    q, k, v = qkv()
    mask = torch.rand(2, 7) < 0.5
    mask[:, 0] = True
    assert torch.allclose(attend(q, k, v, mask), naive(q, k, v, mask), atol=1e-12)
    other = torch.where(mask[..., None, None], v, 1e6)
    assert torch.equal(attend(q, k, other, mask), attend(q, k, v, mask))


def test_a_row_without_keys_gives_zeros_and_finite_gradients():
    q, k, v = qkv()
    mask = torch.tensor([[False] * 7, [True] * 7])
    out = attend(q, k, v, mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and x.grad[0].abs().sum() == 0 and x.grad[1].abs().sum() > 0


def test_a_row_without_keys_is_safe_whatever_the_kernel_does_with_it(monkeypatch):
    def formula(q, k, v, attn_mask=None):
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~attn_mask, float("-inf"))
        return scores.softmax(-1) @ v  # 0 / 0 where a row keeps nothing

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", formula)
    q, k, v = qkv()
    out = attend(q, k, v, torch.tensor([[False] * 7, [True] * 7]))
    out.square().sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))


def test_bf16_on_the_cpu_is_the_float32_result_rounded():
    q, k, v = (x.detach().bfloat16() for x in qkv())
    out = attend(q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(q.float(), k.float(), v.float()).bfloat16())


def packed_qkv(segments, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = (sum(segments.q_lengths), sum(segments.k_lengths), sum(segments.k_lengths))
    return [torch.randn(1, size, 3, 8, dtype=dtype, requires_grad=True) for size in sizes]


def owners(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def block_diagonal(q, k, v, segments):
    same = owners(segments.q_lengths)[:, None] == owners(segments.k_lengths)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(~same, float("-inf")).softmax(-1), v)


SEGMENTS = [
    Segments((3, 5, 3, 1), (3, 5, 3, 1)),
    Segments((3, 3, 2, 3), (2, 1, 4, 2)),
    Segments((0, 3, 0, 4, 0), (2, 3, 0, 1, 2)),  # keys that no query reads
]


@pytest.mark.parametrize("segments", SEGMENTS)
def test_segments_equal_a_block_diagonal_mask(segments):
    q, k, v = packed_qkv(segments)
    out, expected = attend(q, k, v, segments=segments), block_diagonal(q, k, v, segments)
    assert torch.allclose(out, expected, atol=1e-12)
    found, true = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, true, strict=True))


def test_segments_and_a_mask_or_several_rows_are_refused():
    q, k, v = packed_qkv(SEGMENTS[0])
    with pytest.raises(ValueError, match="one row and no key_mask"):
        attend(q, k, v, torch.ones(1, 12, dtype=torch.bool), segments=SEGMENTS[0])
    with pytest.raises(ValueError, match="got 2 rows"):
        attend(*qkv(), segments=Segments((5,), (7,)))


def reference_self_attention(module, dim, heads):
    reference = Attention(dim, heads=heads, dim_head=dim // heads, bias=True, qk_norm="rms_norm", eps=1e-6)
    weights, biases = module.qkv.weight.chunk(3), module.qkv.bias.chunk(3)
    for linear, weight, bias in zip((reference.to_q, reference.to_k, reference.to_v), weights, biases, strict=True):
        linear.load_state_dict({"weight": weight, "bias": bias})
    reference.to_out[0].load_state_dict(module.out.state_dict())
    reference.norm_q.load_state_dict(module.q_norm.state_dict())
    reference.norm_k.load_state_dict(module.k_norm.state_dict())
    return reference


def test_self_attention_equals_diffusers_where_positions_do_not_matter():
    torch.manual_seed(0)
    module = SelfAttention(24, 3)
    torch.nn.init.normal_(module.q_norm.weight)
    torch.nn.init.normal_(module.k_norm.weight)
    x, tables = torch.randn(2, 5, 24), rope_tables(torch.zeros(1, 5, 3), (4, 2, 2))
    assert torch.allclose(module(x, *tables), reference_self_attention(module, 24, 3)(x), atol=1e-5)
    moved = rope_tables(torch.rand(1, 5, 3) * 5, (4, 2, 2))
    assert not torch.allclose(module(x, *moved), module(x, *tables), atol=1e-3)


def test_self_attention_reads_its_own_seam():
    module, other = SelfAttention(24, 3), SelfAttention(24, 3)
    module.attend = lambda q, k, v, key_mask=None: torch.zeros_like(q)
    x, tables = torch.randn(2, 5, 24), rope_tables(torch.zeros(1, 5, 3), (4, 2, 2))
    assert torch.equal(module(x, *tables), module.out.bias.expand(2, 5, 24))
    assert other.attend is attend


def test_cross_attention_equals_the_formula_and_ignores_order_and_padding_of_the_context():
    torch.manual_seed(0)
    module = CrossAttention(24, 3, qk_norm=False).double()
    x, context = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 4, 24, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    k, v = (y.unflatten(-1, (3, 8)) for y in module.kv(context).chunk(2, -1))
    expected = module.out(naive(module.q(x).unflatten(-1, (3, 8)), k, v, mask).flatten(2))
    out = module(x, context, mask)
    assert torch.allclose(out, expected, atol=1e-12)
    order = torch.tensor([2, 3, 0, 1])
    assert torch.allclose(module(x, context[:, order], mask[:, order]), out, atol=1e-12)
    padded = torch.nn.functional.pad(context, (0, 0, 0, 3), value=9.0), torch.nn.functional.pad(mask, (0, 3))
    assert torch.allclose(module(x, *padded), out, atol=1e-12)


class FakeCuda(SimpleNamespace):
    """What ``select_backend`` looks at of a query on a GPU."""

    def __init__(self, head_dim=64, dtype=torch.bfloat16):
        super().__init__(device=torch.device("cuda"), dtype=dtype, shape=(2, 5, 3, head_dim))


def varlen(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):
    """What both flash-attn interfaces define, on (tokens, heads, head_dim), block by block."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    sizes = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert (int(sizes[0].max()), int(sizes[1].max())) == (max_seqlen_q, max_seqlen_k)
    assert sizes[0].min() > 0 and sizes[1].min() > 0
    blocks = zip(q.split(sizes[0].tolist()), *(x.split(sizes[1].tolist()) for x in (k, v)), strict=True)
    return torch.cat([naive(*(x[None] for x in block))[0] for block in blocks])


@pytest.fixture
def fake_kernels(monkeypatch):
    """Make flash-attn 4 and 2 importable; returns the switch that says which are installed."""
    installed = {"flash_attn_4": True, "flash_attn_2": True, "sdpa": True}
    two, four = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    two.flash_attn_func = lambda q, k, v: q + 2
    two.flash_attn_varlen_func = varlen
    four.flash_attn_varlen_func = lambda *args, **options: (varlen(*args, **options), None)
    four.flash_attn_func = lambda q, k, v: (q + 4, None)
    monkeypatch.setitem(sys.modules, "flash_attn", two)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", four)
    monkeypatch.setattr(attention, "available_backends", lambda: installed)
    caches = (attention._flash_kernel, attention._warn_slow)
    for cache in caches:
        cache.cache_clear()
    yield installed
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("query", "masked", "capability", "expected"),
    [
        (FakeCuda(), False, (9, 0), "flash_attn_4"),
        (FakeCuda(), False, (8, 0), "flash_attn_2"),  # Ampere: flash-attn 4 starts at Hopper
        (FakeCuda(256), False, (10, 0), "flash_attn_2"),  # too wide a head for 4
        (FakeCuda(320), False, (10, 0), "sdpa"),
        (FakeCuda(60), False, (9, 0), "sdpa"),  # not a multiple of 8
        (FakeCuda(), False, (7, 5), "sdpa"),
        (FakeCuda(), True, (9, 0), "sdpa"),
        (FakeCuda(dtype=torch.float32), False, (9, 0), "sdpa"),
    ],
)
def test_backend_fits_the_queries(fake_kernels, query, masked, capability, expected):
    assert select_backend(query, masked=masked, capability=capability) == expected


def test_backend_falls_back_to_what_is_installed(fake_kernels, caplog):
    fake_kernels["flash_attn_4"] = False
    assert select_backend(FakeCuda(), masked=False, capability=(9, 0)) == "flash_attn_2"
    attention._flash_kernel.cache_clear()
    fake_kernels["flash_attn_2"] = False
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select_backend(FakeCuda(), masked=False, capability=(9, 0)) == "sdpa"
    assert sum("scaled_dot_product_attention" in record.message for record in caplog.records) == 1


def test_a_kernel_that_does_not_load_is_skipped_with_a_warning(fake_kernels, monkeypatch, caplog):
    monkeypatch.delattr(sys.modules["flash_attn.cute"], "flash_attn_func")
    with caplog.at_level(logging.WARNING):
        assert select_backend(FakeCuda(), masked=False, capability=(9, 0)) == "flash_attn_2"
    assert "flash_attn.cute is installed but does not load" in caplog.text


def test_the_chosen_kernel_runs_and_its_extra_results_are_dropped(fake_kernels, monkeypatch):
    q, k, v = (x.detach() for x in qkv())
    for name, added in (("flash_attn_4", 4), ("flash_attn_2", 2)):
        monkeypatch.setattr(attention, "select_backend", lambda q, *, masked, packed=False, name=name: name)
        assert torch.equal(attend(q, k, v), q + added)


@pytest.mark.parametrize("name", ["flash_attn_4", "flash_attn_2"])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_packs_run_through_the_varlen_kernel(fake_kernels, monkeypatch, name, segments):
    q, k, v = packed_qkv(segments)
    expected = block_diagonal(q, k, v, segments)
    monkeypatch.setattr(attention, "select_backend", lambda q, *, masked, packed: name if packed else "sdpa")
    monkeypatch.setattr(attention, "_sdpa", None)
    with torch.inference_mode():
        assert torch.allclose(attend(q, k, v, segments=segments), expected, atol=1e-12)
    out = attend(q, k, v, segments=segments)
    found, true = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, true, strict=True))
    assert not any(x.is_inference() for x in (attention._offsets(segments.q_lengths, q.device),))


def test_a_flash_attn_without_varlen_serves_whole_tensors_only(fake_kernels, monkeypatch):
    monkeypatch.delattr(sys.modules["flash_attn.cute"], "flash_attn_varlen_func")
    assert select_backend(FakeCuda(), masked=False, packed=True, capability=(9, 0)) == "flash_attn_2"
    assert select_backend(FakeCuda(), masked=False, capability=(9, 0)) == "flash_attn_4"


@pytest.mark.parametrize(("files", "expected"), [(("cute",), (True, False)), (("cute", "__init__.py"), (True, True))])
def test_backends_are_found_without_importing(tmp_path, monkeypatch, files, expected):
    package = tmp_path / "flash_attn"
    (package / "cute").mkdir(parents=True)
    (package / "cute" / "__init__.py").write_text("raise RuntimeError('imported')")
    if "__init__.py" in files:
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for module in ("cutlass", "flash_attn_2_cuda"):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = available_backends()
    assert (found["flash_attn_4"], found["flash_attn_2"], found["sdpa"]) == (*expected, True)


@pytest.mark.gpu
def test_flash_equals_sdpa_on_a_gpu():
    if not any(available_backends()[name] for name in ("flash_attn_4", "flash_attn_2")):
        pytest.skip("flash-attn is not installed")
    q, k, v = (torch.randn(2, 65, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert select_backend(q, masked=False) != "sdpa"
    reference = attention._sdpa(q.float(), k.float(), v.float(), None)
    assert (attend(q, k, v).float() - reference).abs().max() < 0.02
    packed, segments = [x[:1] for x in (q, k, v)], Segments((30, 1, 34), (30, 1, 34))
    reference = attention._sdpa_segments(*(x.float() for x in packed), segments)
    assert (attend(*packed, segments=segments).float() - reference).abs().max() < 0.02


@pytest.mark.parametrize("counts", [(5, 1, 0), (3, 3, 3)])
def test_a_key_that_stands_for_many_equals_all_of_them(counts):
    torch.manual_seed(0)
    blocks = Segments((4, 2, 4), (3, 2, 3))
    q, (k, v) = torch.randn(1, 10, 2, 8, dtype=F64), torch.randn(2, 1, 8, 2, 8, dtype=F64)
    repeats = Repeats.of(counts, q)
    written = Segments((4, 2, 4), tuple(n - 1 + c for n, c in zip(blocks.k_lengths, counts, strict=True)))
    longer = [repeats.spread(x, blocks.k_lengths) for x in (k, v)]
    expected = attend(q, *longer, segments=written)
    assert torch.allclose(attend_repeated(q, k, v, repeats, blocks), expected, rtol=0, atol=1e-12)
    one = Repeats.of((counts[0],), q)
    expected = attend(q, one.spread(k, None), one.spread(v, None))
    assert torch.allclose(attend_repeated(q, k, v, one), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(attend_repeated(q, k, v, one), attend(q, k, v), rtol=0, atol=1e-3)


def test_half_precision_on_a_device_reads_the_copies(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "attend", lambda q, k, v, **given: seen.append((k.shape[1], given["segments"])) or q)
    q = torch.zeros(1, 5, 2, 8, dtype=torch.bfloat16, device="meta")
    repeats = Repeats((4, 0), torch.zeros(2))
    attend_repeated(q, q, q, repeats, Segments((2, 3), (2, 3)))
    attend_repeated(q, q, q, Repeats((7,), torch.zeros(1)))
    assert seen == [(7, Segments((2, 3), (5, 2))), (11, None)]
