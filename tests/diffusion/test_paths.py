import torch

from ltd.diffusion import LinearPath


def test_ends_inverses_and_derivative():
    torch.manual_seed(0)
    path = LinearPath()
    x0, eps = torch.randn(2, 4, 3, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 0.3, 0.7], dtype=torch.float64)
    x_t, v = path.interpolate(x0, eps, t), path.velocity(x0, eps)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[1], eps[1])  # t = 0 is data, t = 1 is noise
    assert torch.allclose(path.data(x_t, v, t), x0, atol=1e-14)
    assert torch.allclose(path.noise(x_t, v, t), eps, atol=1e-14)
    slope = (path.interpolate(x0, eps, t + 1e-4) - path.interpolate(x0, eps, t - 1e-4)) / 2e-4
    assert torch.allclose(slope, v, atol=1e-10)
