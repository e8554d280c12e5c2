"""How far an inpainted image is from the original: (x, x_hat) -> (B,), higher = more out-of-distribution.

Images are (B, C, H, W) in [-1, 1]. Each distance is a module; only those with weights have a state.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..exceptions import UsageError, WeightsError, did_you_mean, first_line
from .residuals import mfsim, mse

if TYPE_CHECKING:
    from ..features.extractor import FeatureExtractor

#: Names of distances.
DISTANCES = ("lpips", "mse", "ssim", "features")
#: Networks whose features LPIPS compares, and torchvision's names for them.
TRUNKS = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}
# What is left of smaller images has no pixel in the last layers.
_SMALLEST = {"squeeze": 17, "alex": 31, "vgg": 16}


class Distance(nn.Module):
    """(B, C, H, W) twice -> (B,). Images must have at least ``smallest`` pixels a side."""

    smallest = 1


class MSE(Distance):
    """Mean squared error over pixels and channels, in [0, 4]."""

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B,)."""
        return mse(x.flatten(1), x_hat.flatten(1), [x[0].numel()])[:, 0]


class SSIM(Distance):
    """1 - structural similarity (Wang et al., 2004; Gaussian window of 11 pixels), in [0, 2]."""

    smallest = 11

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure
        except ImportError:
            raise UsageError("the distance ssim needs a package: pip install 'featdiff[pixel]'") from None
        self._measure = structural_similarity_index_measure

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B,)."""
        # single precision would find differences in flat images that are none; MPS has no other
        a, b = (image.to("cpu" if image.device.type == "mps" else image.device).double() for image in (x, x_hat))
        similarity = torch.as_tensor(self._measure(b, a, data_range=2.0, reduction="none"))
        return (1 - similarity).to(x)


class LPIPS(Distance):
    """Learned perceptual distance (Zhang et al., CVPR 2018, version 0.1), >= 0.

    Parameters
    ----------
    trunk : one of ``TRUNKS``
    weights : path, optional
        State dict of torchvision's network of that name; default: torchvision's own, downloaded once.

    Raises
    ------
    UsageError
        An unknown trunk, or the package ``lpips`` is missing.
    WeightsError
        The weights cannot be had or do not fit.
    """

    def __init__(self, trunk: str, weights: str | os.PathLike[str] | None = None, load: bool = True) -> None:
        super().__init__()
        if trunk not in TRUNKS:
            raise UsageError(f"unknown trunk {trunk!r}{did_you_mean(trunk, list(TRUNKS))}; known: {', '.join(TRUNKS)}")
        try:
            import lpips
        except ImportError:
            raise UsageError("the distance lpips needs a package: pip install 'featdiff[pixel]'") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision in an old way
            self._measure = [lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)]  # in a list: not part of the state
        self.trunk, self.smallest = self._measure[0].net, _SMALLEST[trunk]
        if load:
            self._load(trunk, weights)
        self.requires_grad_(False).eval()

    def _load(self, trunk: str, weights: str | os.PathLike[str] | None) -> None:
        found = _read(trunk, weights)
        # slices of the trunk keep the numbers of torchvision's layers: slice2.5.weight is features.5.weight
        wanted = {name: f"features.{name.partition('.')[2]}" for name in self.trunk.state_dict()}
        missing = [name for name in wanted.values() if name not in found]
        if missing:
            raise WeightsError(f"{weights} does not fit torchvision's {TRUNKS[trunk]}: {missing[0]} is missing")
        try:
            self.trunk.load_state_dict({name: found[source].float() for name, source in wanted.items()})
        except RuntimeError as error:
            raise WeightsError(f"{weights} does not fit torchvision's {TRUNKS[trunk]}: {error}") from None

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) twice -> (B,)."""
        measure = self._measure[0].to(x.device)
        x, x_hat = (image.expand(-1, 3, -1, -1) for image in (x, x_hat))
        return torch.as_tensor(measure(x, x_hat)).flatten()


def _read(trunk: str, weights: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """A state dict from a file, or torchvision's own."""
    from ..features.weights import read_state_dict

    if weights is not None:
        return read_state_dict(weights)
    from torchvision.models import get_model_weights

    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch tells there that it downloads; rows of data go to stdout
            state: dict[str, Tensor] = get_model_weights(TRUNKS[trunk]).DEFAULT.get_state_dict(progress=True)
    except Exception as error:  # whatever urllib and torch.hub raise
        reason = first_line(error)
        raise WeightsError(
            f"the weights of {TRUNKS[trunk]}, which lpips looks through, could not be downloaded ({reason}): "
            "give a file with --weights, or choose another distance: --distances mse,ssim"
        ) from None
    return state


class FeatureCosine(Distance):
    """1 - cosine of a backbone's features, in [0, 2]; images are brought to its size (as LMD does with SimCLR's).

    Parameters
    ----------
    extractor : FeatureExtractor
        Its last layer is compared; it is not part of the state.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self._extractor = [extractor]
        config = extractor.backbone.data_config
        self.size = config["input_size"][-1]
        self.fingerprint = extractor.backbone.fingerprint
        self.mean, self.std = (torch.tensor(config[key]).reshape(3, 1, 1) for key in ("mean", "std"))

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) twice -> (B,)."""
        a, b = self._features(x), self._features(x_hat)
        return mfsim(a, b, [a.shape[1]])[:, 0]

    def _features(self, x: Tensor) -> Tensor:
        extractor = self._extractor[0]
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=self.size, mode="bicubic", antialias=True)
        pixels = (x.clamp(-1, 1) + 1) / 2
        rows: Tensor = extractor((pixels - self.mean.to(x)) / self.std.to(x))
        return rows[:, extractor.layout.layers[-1].columns]
