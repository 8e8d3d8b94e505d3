"""Mixture of experts in which experts choose their tokens, so that every expert has equal work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertChoice(nn.Module):
    """A perceptron split into experts, each of which takes the tokens of a sample that it likes best.

    A token that no expert takes gets zeros. Each sample routes by itself.

    Reference: Zhou et al. (2022), arXiv 2202.09368, Sec. 3.2; as in Sehwag et al. (2024), MicroDiT, arXiv 2407.15811.

    Args:
        dim: Width of the tokens.
        hidden: Width between the two products of an expert.
        num: Number of experts.
        capacity: How many experts a token meets on average, at most ``num``.
    """

    needs_all_tokens = True

    def __init__(self, dim: int, hidden: int, *, num: int, capacity: float) -> None:
        super().__init__()
        self.num, self.capacity = num, capacity
        self.router = nn.Linear(dim, num, bias=False)
        self.input = nn.Parameter(torch.empty(num, dim, hidden))
        self.out = nn.Parameter(torch.empty(num, hidden, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every expert like a Xavier-uniform product of its own."""
        for expert in (*self.input, *self.out):
            nn.init.xavier_uniform_(expert)

    def tokens_per_expert(self, num_tokens: int) -> int:
        """How many of a sample's tokens each expert takes."""
        return min(num_tokens, max(1, round(self.capacity * num_tokens / self.num)))

    def forward(self, x: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
        """Map tokens ``(b, n, dim)``; ``lengths`` are those of the samples of a pack, b = 1."""
        if lengths is not None:
            return torch.cat([self._route(part) for part in x.split(list(lengths), 1)], 1)
        return self._route(x)

    def _route(self, x: Tensor) -> Tensor:
        affinity = self.router(x).float().softmax(-1)  # b n num
        gate, chosen = affinity.mT.topk(self.tokens_per_expert(x.shape[1]), dim=-1)  # b num k
        taken = torch.take_along_dim(x.unsqueeze(1), chosen.unsqueeze(-1), 2)  # b num k dim
        made = F.gelu(torch.einsum("beki,eij->bekj", taken, self.input.to(x.dtype)), approximate="tanh")
        made = torch.einsum("bekj,eji->beki", made, self.out.to(x.dtype)) * gate.unsqueeze(-1).to(x.dtype)
        target = chosen.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return made.new_zeros(x.shape).scatter_add(1, target, made.flatten(1, 2))
