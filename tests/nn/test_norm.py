"""RMSNorm against its formula, in the dtypes it promises."""

from __future__ import annotations

import pytest
import torch

from ltd.nn.norm import ChannelRMSNorm, RMSNorm


def _redrawn(norm: RMSNorm) -> RMSNorm:
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    return norm


def test_equals_the_formula() -> None:
    norm = _redrawn(RMSNorm(24)).double()
    x = torch.randn(3, 5, 24, dtype=torch.float64) * 7
    expected = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_zero_stays_zero() -> None:
    assert RMSNorm(8)(torch.zeros(2, 8)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_fp32_statistics_and_keeps_dtype(dtype: torch.dtype) -> None:
    norm = _redrawn(RMSNorm(512)).to(dtype)
    # The sum of squares of 512 values near 30 overflows float16 and loses digits in bfloat16.
    x = (torch.randn(64, 512) * 30).to(dtype)
    wide = torch.nn.functional.rms_norm(x.float(), (512,), norm.weight.float(), norm.eps).to(dtype)
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), wide)


def test_channel_norm_is_the_token_norm_at_every_pixel() -> None:
    norm = _redrawn(ChannelRMSNorm(6)).double()
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    for t in range(3):
        expected = RMSNorm.forward(norm, x[:, :, t].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(norm(x)[:, :, t], expected, rtol=1e-14, atol=1e-14)


def test_channel_norm_keeps_channels_last() -> None:
    x = torch.randn(2, 6, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    assert ChannelRMSNorm(6)(x).is_contiguous(memory_format=torch.channels_last_3d)
