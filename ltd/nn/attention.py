"""Attention behind one seam: ``attend`` picks flash-attn where it is installed and can serve, SDPA otherwise.

``SelfAttention`` holds ``attend`` as an attribute, so that sequence parallelism can replace it on an instance. The only
module that imports flash-attn. Knows nothing of processes.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.nn.norm import RMSNorm
from ltd.nn.packing import Repeats, Segments, by_sample
from ltd.nn.rope import apply_rope

logger = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]

_MAX_HEAD_DIM = {"flash_attn_4": 128, "flash_attn_2": 256}
_MIN_CAPABILITY = {"flash_attn_4": (9, 0), "flash_attn_2": (8, 0)}
_MODULES = {"flash_attn_4": "flash_attn.cute", "flash_attn_2": "flash_attn"}


def available_backends() -> dict[str, bool]:
    """Tell which attention kernels are installed, without importing any.

    Returns:
        ``flash_attn_4``, ``flash_attn_2`` and ``sdpa`` -> whether it is installed; best first.
    """
    package = find_spec("flash_attn")
    # flash-attn 4 lives in the namespace of flash-attn 2: looking the submodule up by name would import the parent.
    paths = list(package.submodule_search_locations or []) if package else []
    has_4 = (
        bool(paths) and PathFinder.find_spec("flash_attn.cute", paths) is not None and find_spec("cutlass") is not None
    )
    has_2 = package is not None and package.origin is not None and find_spec("flash_attn_2_cuda") is not None
    return {"flash_attn_4": has_4, "flash_attn_2": has_2, "sdpa": True}


@functools.cache
def _flash_kernel(name: str, packed: bool) -> Kernel | None:
    """Import one flash-attn kernel; None, with a warning, if it is installed but does not load."""
    if not available_backends()[name]:
        return None
    try:
        module = importlib.import_module(_MODULES[name])
        function = module.flash_attn_varlen_func if packed else module.flash_attn_func
    except (ImportError, OSError, AttributeError) as error:
        logger.warning("%s is installed but does not load (%s)", _MODULES[name], error)
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result  # flash-attn 4 adds the log-sum-exp

    return kernel


@functools.cache
def _warn_slow(reason: str) -> None:
    logger.warning("attention runs through torch's scaled_dot_product_attention: %s", reason)


def select_backend(q: Tensor, *, masked: bool, packed: bool = False, capability: tuple[int, int] | None = None) -> str:
    """Choose the kernel for queries of this device, dtype and size.

    Args:
        q: Queries ``(b, n, heads, head_dim)``.
        masked: Whether keys are masked; flash-attn takes no mask.
        packed: Whether attention is block-diagonal over a pack; flash-attn has kernels of their own for it.
        capability: Compute capability of the device; looked up when None.

    Returns:
        ``flash_attn_4``, ``flash_attn_2`` or ``sdpa``.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or masked:
        return "sdpa"
    capability = capability or torch.cuda.get_device_capability(q.device)
    for name in ("flash_attn_4", "flash_attn_2"):
        fits = q.shape[-1] <= _MAX_HEAD_DIM[name] and q.shape[-1] % 8 == 0 and capability >= _MIN_CAPABILITY[name]
        if fits and _flash_kernel(name, packed) is not None:
            return name
    _warn_slow(f"no flash-attn kernel is installed for head_dim {q.shape[-1]} on compute capability {capability}")
    return "sdpa"


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, segments: Segments | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q: ``(b, n, heads, head_dim)``.
        k: ``(b, m, heads, head_dim)``.
        v: Like ``k``.
        key_mask: Bool ``(b, m)``, True = keep; a row that keeps no key gives zeros.
        segments: Blocks of n queries and m keys for b = 1; a query reads its block's keys only. Not with a mask.

    Returns:
        ``(b, n, heads, head_dim)``.

    Raises:
        ValueError: If both a mask and segments are given, or segments and several rows.
    """
    if segments is not None and (key_mask is not None or len(q) != 1):
        raise ValueError(
            f"segments: needed one row and no key_mask, got {len(q)} rows, key_mask {key_mask is not None}"
        )
    backend = select_backend(q, masked=key_mask is not None, packed=segments is not None)
    kernel = _flash_kernel(backend, segments is not None) if backend != "sdpa" else None
    if segments is not None:
        return _varlen(kernel, q, k, v, segments) if kernel else _sdpa_segments(q, k, v, segments)
    return kernel(q, k, v) if kernel else _sdpa(q, k, v, key_mask)


def attend_repeated(q: Tensor, k: Tensor, v: Tensor, repeats: Repeats, segments: Segments | None = None) -> Tensor:
    """Attend as ``attend`` to keys of which the last, of every block, stands for several equal ones.

    Where scores are computed in fp32 or more, that is one key with the logarithm of the number added to its score: the
    same function, without the copies. Half-precision kernels take no such term exactly: there the copies are made.

    Args:
        q: ``(b, n, heads, head_dim)``.
        k: ``(b, m, heads, head_dim)``.
        v: Like ``k``.
        repeats: How many keys the last one stands for.
        segments: Blocks of a pack.

    Returns:
        ``(b, n, heads, head_dim)``.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and q.device.type != "cpu":
        lengths = None if segments is None else segments.k_lengths
        if segments is not None:
            sizes = zip(segments.k_lengths, repeats.counts, strict=True)
            segments = Segments(segments.q_lengths, tuple(size - 1 + count for size, count in sizes))
        return attend(q, repeats.spread(k, lengths), repeats.spread(v, lengths), segments=segments)
    return (
        _sdpa(q, k, v, None, repeats.bias(k.shape[1]))
        if segments is None
        else _sdpa_segments(q, k, v, segments, repeats)
    )


def _varlen(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    if 0 in segments.q_lengths:  # keys that nobody here reads: kernels differ in what gradient they leave there
        read = [num_queries > 0 for num_queries in segments.q_lengths]
        k, v = (
            torch.cat([part for part, kept in zip(x.split(segments.k_lengths, 1), read, strict=True) if kept], 1)
            for x in (k, v)
        )
        k_lengths = tuple(length for length, kept in zip(segments.k_lengths, read, strict=True) if kept)
        segments = Segments(tuple(length for length in segments.q_lengths if length), k_lengths)
    return kernel(
        q[0],
        k[0],
        v[0],
        cu_seqlens_q=_offsets(segments.q_lengths, q.device),
        cu_seqlens_k=_offsets(segments.k_lengths, q.device),
        max_seqlen_q=max(segments.q_lengths),
        max_seqlen_k=max(segments.k_lengths),
    ).unsqueeze(0)


@functools.lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    # Every block of a pass asks for the same; an inference tensor in the cache would fail in a later backward pass.
    with torch.inference_mode(False):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _sdpa_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, repeats: Repeats | None = None) -> Tensor:
    """Attend block by block; blocks of equal sizes, neighbours or not, share a call, and no (n, m) mask is made."""
    sides = ((q, segments.q_lengths), (k, segments.k_lengths), (v, segments.k_lengths))
    blocks = list(zip(*(x.split(lengths, 1) for x, lengths in sides), strict=True))
    groups: dict[tuple[int, int], list[int]] = {}
    for index, sizes in enumerate(zip(segments.q_lengths, segments.k_lengths, strict=True)):
        if sizes[0]:
            groups.setdefault(sizes, []).append(index)
    outs: dict[int, Tensor] = {}
    for (_, num_keys), members in groups.items():
        q, k, v = (
            torch.cat(rows) if len(rows) > 1 else rows[0] for rows in zip(*(blocks[i] for i in members), strict=True)
        )
        bias = None if repeats is None else repeats.bias(num_keys, members)
        outs.update(zip(members, _sdpa(q, k, v, None, bias).split(1), strict=True))
    return torch.cat([outs[index] for index in sorted(outs)], 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
    dtype = q.dtype
    if q.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        # torch's CPU kernel is 2 to 4 times slower in half precision than in float32 (backward most of all).
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b heads n head_dim
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).to(dtype)
    some = key_mask.any(1)[:, None, None, None]
    # A row without keys attends to all of them and is zeroed after: no 0 / 0, forward or backward.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None, :] | ~some)
    return torch.where(some, out, 0).transpose(1, 2).to(dtype)


class HeadProjections(nn.Module):
    """Queries, keys and values of tokens, and the product behind attention: what attention has besides attending.

    Args:
        dim: Width; divides by ``num_heads``.
        num_heads: Attention heads.
        qk_norm: Whether queries and keys pass an RMSNorm.
        norm_over: What the norm averages over: each ``"head"``, or all channels (``"width"``).
        bias: Whether the product that makes queries, keys and values has a bias.
        eps: Of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = True,
        norm_over: Literal["head", "width"] = "head",
        bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.norm_over = num_heads, norm_over
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm, self.k_norm = (_qk_norm(dim, num_heads, qk_norm, norm_over, eps) for _ in range(2))
        self.out = nn.Linear(dim, dim)

    def project(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries, keys and values ``(b, n, heads, head_dim)`` of tokens ``(b, n, dim)``, rotated as told."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = _normed(q, self.q_norm, self.num_heads, self.norm_over)
        k = _normed(k, self.k_norm, self.num_heads, self.norm_over)
        if cos is not None and sin is not None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v.unflatten(-1, (self.num_heads, -1))


class SelfAttention(HeadProjections):
    """Full self-attention with rotary positions and normalised queries and keys.

    Reference: Dehghani et al. (2023), arXiv 2302.05442, Sec. 2 (QK norm).

    Args:
        dim: Width; divides by ``num_heads``.
        num_heads: Attention heads.
        options: As ``HeadProjections``.
    """

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.attend = attend

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        segments: Segments | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: ``(b, n, dim)``.
            cos: Rotation table of ``ltd.nn.rope``, ``(b or 1, n, 1, head_dim / 2)``; None rotates nothing.
            sin: Like ``cos``.
            segments: The samples of a pack, b = 1; None when a row is a sample.
            key_mask: Bool ``(b, n)``, True = a token that is read; None = all are.

        Returns:
            ``(b, n, dim)``.
        """
        return self.out(mix(self.attend, *self.project(x, cos, sin), segments, key_mask).flatten(2))


def mix(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, key_mask: Tensor | None) -> Tensor:
    """Attend with what is given of segments and mask: what stands in for ``attend`` may know neither."""
    given = {"segments": segments, "key_mask": key_mask}
    return kernel(q, k, v, **{name: value for name, value in given.items() if value is not None})


class CrossAttention(nn.Module):
    """Attention from tokens to a context, such as text, that every process holds whole.

    A second context, such as the tokens of an image encoder, has keys and values of its own; what both give is added.

    Args:
        dim: Width of tokens and context; divides by ``num_heads``.
        num_heads: Attention heads.
        qk_norm: Whether queries and keys pass an RMSNorm.
        norm_over: What the norm averages over: each ``"head"``, or all channels (``"width"``).
        bias: Whether the products that make queries, keys and values have a bias.
        eps: Of the norms.
        image: Whether there is a second context.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = True,
        norm_over: Literal["head", "width"] = "head",
        bias: bool = True,
        eps: float = 1e-6,
        image: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.norm_over = num_heads, norm_over
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.q_norm, self.k_norm = (_qk_norm(dim, num_heads, qk_norm, norm_over, eps) for _ in range(2))
        self.image_kv = nn.Linear(dim, 2 * dim, bias=bias) if image else None
        self.image_k_norm = _qk_norm(dim, num_heads, qk_norm, norm_over, eps) if image else None
        self.out = nn.Linear(dim, dim)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values ``(b, m, heads, head_dim)`` of a context ``(b, m, dim)``."""
        k, v = self.kv(context).chunk(2, dim=-1)
        k = _normed(k, self.k_norm, self.num_heads, self.norm_over)
        return k, v.unflatten(-1, (self.num_heads, -1))

    def image_keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values of the second context."""
        assert self.image_kv is not None and self.image_k_norm is not None
        k, v = self.image_kv(context).chunk(2, dim=-1)
        k = _normed(k, self.image_k_norm, self.num_heads, self.norm_over)
        return k, v.unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor],
        context_mask: Tensor | None,
        segments: Segments | None = None,
        image: Tensor | tuple[Tensor, Tensor] | None = None,
        repeats: Repeats | None = None,
    ) -> Tensor:
        """Read the context.

        Args:
            x: ``(b, n, dim)``.
            context: ``(b, m, dim)``, or what ``keys`` made of it.
            context_mask: Bool ``(b, m)``, True = keep; a row that keeps nothing reads zeros; None keeps all. Of a pack:
                bool ``(samples, 1)``, False = the sample reads zeros; None = all read.
            segments: A pack's tokens and context per sample, b = 1; None when a row is a sample.
            image: ``(b, m', dim)``, or what ``image_keys`` made of it; None reads none. Not with segments.
            repeats: How many tokens the last one of the context stands for; None = one. Not with a mask.

        Returns:
            ``(b, n, dim)``.
        """
        q = _normed(self.q(x), self.q_norm, self.num_heads, self.norm_over)
        k, v = self.keys(context) if isinstance(context, Tensor) else context
        if repeats is not None:
            mixed = attend_repeated(q, k, v, repeats, segments).flatten(2)
        else:
            mixed = attend(q, k, v, context_mask if segments is None else None, segments).flatten(2)
        if segments is None:
            if image is not None:
                k, v = self.image_keys(image) if isinstance(image, Tensor) else image
                mixed = mixed + attend(q, k, v).flatten(2)
            return self.out(mixed)
        if context_mask is not None:
            mixed = by_sample(_zero_unless, segments.q_lengths, [mixed], [context_mask.unsqueeze(-1)])
        return self.out(mixed)


def _qk_norm(dim: int, num_heads: int, normed: bool, over: str, eps: float) -> nn.Module:
    if not normed:
        return nn.Identity()
    return RMSNorm(dim // num_heads if over == "head" else dim, eps)


def _normed(x: Tensor, norm: nn.Module, num_heads: int, over: str) -> Tensor:
    """Normalise ``(b, n, dim)`` and split it into heads ``(b, n, heads, head_dim)``."""
    if over == "width":
        return norm(x).unflatten(-1, (num_heads, -1))
    return norm(x.unflatten(-1, (num_heads, -1)))


def _zero_unless(x: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, x, 0)
