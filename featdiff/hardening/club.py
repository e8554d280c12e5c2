"""CLUB: an upper bound of mutual information that can be minimised (Cheng et al., ICML 2020, arXiv 2006.12013)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

_HIDDEN = 256
#: Hidden widths of the mean's network for latents, in the released code of outlier-aware learning.
DEEP = (32, 16, _HIDDEN)


class Club(nn.Module):
    """A Gaussian q(h | o) of features h given outliers o, with diagonal covariance, and the bound that it gives.

    In outlier-aware learning (arXiv 2406.16525) the bound is minimised by the network that makes h, so that features of
    ordinary images tell nothing of outliers. It holds only while q is close to the true conditional: train q by
    `log_likelihood` on the same pairs, as the paper on CLUB prescribes.

    Parameters
    ----------
    outliers, features : int
        Widths of o and h.
    hidden : widths between them, of the network for the mean
    """

    def __init__(self, outliers: int, features: int, hidden: Sequence[int] = (_HIDDEN,)) -> None:
        super().__init__()
        self.mean = _perceptron(outliers, *hidden, features)
        self.log_variance = _perceptron(outliers, _HIDDEN, features).append(nn.Tanh())

    def log_likelihood(self, o: Tensor, h: Tensor) -> Tensor:
        """Mean log q(h_i | o_i) of pairs (B, outliers), (B, features), without its constant; to be maximised."""
        mean, log_variance = self.mean(o), self.log_variance(o)
        return (-((mean - h) ** 2) / log_variance.exp() - log_variance).sum(1).mean() / 2

    def forward(self, o: Tensor, h: Tensor) -> Tensor:
        """Upper bound of I(o; h) in nats (eq. 8): pairs against all combinations in the batch.

        About 0 where o tells nothing of h. From few pairs it is noisy and may come out negative.
        """
        mean, log_variance = self.mean(o), self.log_variance(o)
        paired = (mean - h) ** 2
        # the mean over all h_j of (h_j - mean_i)^2, without a (B, B, features) tensor
        every = (mean - h.mean(0)) ** 2 + h.var(0, correction=0)
        return ((every - paired) / log_variance.exp()).sum(1).mean() / 2


def _perceptron(*widths: int) -> nn.Sequential:
    """Linear layers, with a ReLU between two."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])
