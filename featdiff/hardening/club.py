"""CLUB: an upper bound of mutual information that can be minimised (Cheng et al., ICML 2020, arXiv 2006.12013)."""

from __future__ import annotations

from torch import Tensor, nn

_HIDDEN = 256


class Club(nn.Module):
    """A Gaussian q(h | o) of features h given outliers o, with diagonal covariance, and the bound that it gives.

    In outlier-aware learning (arXiv 2406.16525) the bound is minimised by the network that makes h, so that features of
    ordinary images tell nothing of outliers. It holds only while q is close to the true conditional: train q by
    `log_likelihood` on the same pairs, as the paper on CLUB prescribes.

    Parameters
    ----------
    outliers, features : int
        Widths of o and h.
    """

    def __init__(self, outliers: int, features: int) -> None:
        super().__init__()
        self.outliers = outliers
        self.mean = nn.Sequential(nn.Linear(outliers, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, features))
        self.log_variance = nn.Sequential(
            nn.Linear(outliers, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, features), nn.Tanh()
        )

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
