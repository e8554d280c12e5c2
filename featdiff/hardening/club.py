"""CLUB: an upper bound of mutual information that can be minimised (Cheng et al., ICML 2020, arXiv 2006.12013).

In: pairs of outliers and features. Out: an estimate of what one says about the other, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

_HIDDEN = 256
#: Hidden widths of the network for the mean of latents, in the released code of outlier-aware learning.
DEEP = (32, 16, _HIDDEN)


class Club(nn.Module):
    """A Gaussian q(h | o) of features h given outliers o, with diagonal covariance, and its bound of I(o; h).

    In outlier-aware learning (arXiv 2406.16525) the network that computes h minimises the bound, so that features of
    ordinary images say nothing about outliers. The bound holds only while q is close to the true conditional
    distribution: train q by :meth:`log_likelihood` on the same pairs, as the CLUB paper prescribes.

    Parameters
    ----------
    outliers : int
        Width of o.
    features : int
        Width of h.
    hidden : sequence of int, default (256,)
        Hidden widths of the network for the mean.

    Examples
    --------
    >>> import torch
    >>> club = Club(outliers=6, features=4)
    >>> club(torch.randn(8, 6), torch.randn(8, 4)).shape
    torch.Size([])
    """

    def __init__(self, outliers: int, features: int, hidden: Sequence[int] = (_HIDDEN,)) -> None:
        super().__init__()
        self.mean = _perceptron(outliers, *hidden, features)
        self.log_variance = _perceptron(outliers, _HIDDEN, features).append(nn.Tanh())

    def log_likelihood(self, o: Tensor, h: Tensor) -> Tensor:
        """Mean log q(h_i | o_i) over pairs, without its constant; to be maximised.

        Parameters
        ----------
        o : Tensor of shape (B, outliers)
        h : Tensor of shape (B, features)

        Returns
        -------
        Tensor of shape ()
        """
        mean = self.mean(o)
        log_variance = self.log_variance(o)
        return (-((mean - h) ** 2) / log_variance.exp() - log_variance).sum(1).mean() / 2

    def forward(self, o: Tensor, h: Tensor) -> Tensor:
        """Upper bound of I(o; h) in nats (eq. 8): pairs against all combinations in the batch.

        About 0 if o says nothing about h. From few pairs the estimate is noisy and may be negative.

        Parameters
        ----------
        o : Tensor of shape (B, outliers)
        h : Tensor of shape (B, features)

        Returns
        -------
        Tensor of shape ()
        """
        mean = self.mean(o)
        log_variance = self.log_variance(o)
        paired = (mean - h) ** 2
        # the mean over all h_j of (h_j - mean_i)^2, without a (B, B, features) tensor
        combined = (mean - h.mean(0)) ** 2 + h.var(0, correction=0)
        return ((combined - paired) / log_variance.exp()).sum(1).mean() / 2


def _perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers.append(nn.Linear(width_in, width_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])
