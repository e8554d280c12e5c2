"""Images and their inpaintings -> how far they are apart, one number for each image. Higher = more OOD.

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
#: Perceptual networks whose features LPIPS compares, and torchvision's names for them.
PERCEPTUAL_NETWORKS = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}
# Side of the smallest image that has a pixel left in the last layer of each perceptual network.
_SMALLEST = {"squeeze": 17, "alex": 31, "vgg": 16}


class Distance(nn.Module):
    """Base class: (B, C, H, W) twice -> (B,).

    Attributes
    ----------
    smallest : int
        Side in pixels of the smallest images that can be compared.
    """

    smallest = 1


class MSE(Distance):
    """Mean squared error over pixels and channels, 0 to 4.

    Examples
    --------
    >>> import torch
    >>> MSE()(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    tensor([1., 1.])
    """

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Images and inpaintings (B, C, H, W) -> (B,)."""
        return mse(x.flatten(1), x_hat.flatten(1), [x[0].numel()])[:, 0]


class SSIM(Distance):
    """1 - structural similarity (Wang et al., 2004; Gaussian window of 11 pixels), 0 to 2.

    Raises
    ------
    UsageError
        The package ``torchmetrics`` is missing.
    """

    smallest = 11

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure
        except ImportError:
            raise UsageError(
                "the distance ssim needs a package: pip install 'featdiff[pixel]'", argument="distances"
            ) from None
        self._measure = structural_similarity_index_measure

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Images and inpaintings (B, C, H, W) -> (B,)."""
        # in single precision, rounding looks like a difference between flat images; MPS has no double precision
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        similarity = self._measure(x_hat.to(device).double(), x.to(device).double(), data_range=2.0, reduction="none")
        return (1 - torch.as_tensor(similarity)).to(x)


class LPIPS(Distance):
    """Learned perceptual distance (Zhang et al., CVPR 2018, version 0.1), 0 or more.

    Parameters
    ----------
    network : str
        The perceptual network, one of ``PERCEPTUAL_NETWORKS``.
    weights : path, optional
        State dict of torchvision's network of that name. Default: torchvision's own weights, downloaded once.
    load : bool, default True
        Whether to load weights at all; False where a saved state follows.

    Attributes
    ----------
    trunk : nn.Module
        The perceptual network. Saved detectors name its tensors ``trunk...``.

    Raises
    ------
    UsageError
        An unknown network, or the package ``lpips`` is missing.
    WeightsError
        The weights cannot be found or do not fit.
    """

    def __init__(self, network: str, weights: str | os.PathLike[str] | None = None, load: bool = True) -> None:
        super().__init__()
        if network not in PERCEPTUAL_NETWORKS:
            hint = did_you_mean(network, list(PERCEPTUAL_NETWORKS))
            known = ", ".join(PERCEPTUAL_NETWORKS)
            raise UsageError(f"unknown trunk {network!r}{hint}; known: {known}", argument="trunk")
        try:
            import lpips
        except ImportError:
            raise UsageError(
                "the distance lpips needs a package: pip install 'featdiff[pixel]'", argument="distances"
            ) from None

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses a deprecated argument of torchvision
            measure = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        self._measure = [measure]  # in a list, so that its tensors are not part of the state
        self.trunk = measure.net
        self.smallest = _SMALLEST[network]

        if load:
            self._load(network, weights)
        self.requires_grad_(False).eval()

    def _load(self, network: str, weights: str | os.PathLike[str] | None) -> None:
        """Load torchvision's weights, or those of a file, into the perceptual network."""
        state = _read(network, weights)
        # lpips cuts the network into slices, but keeps the numbers of torchvision's layers:
        # slice2.5.weight is features.5.weight
        renamed = {}
        for name in self.trunk.state_dict():
            source = f"features.{name.partition('.')[2]}"
            if source not in state:
                raise WeightsError(
                    f"{weights} does not fit torchvision's {PERCEPTUAL_NETWORKS[network]}: {source} is missing"
                )
            renamed[name] = state[source].float()

        try:
            self.trunk.load_state_dict(renamed)
        except RuntimeError as error:
            raise WeightsError(
                f"{weights} does not fit torchvision's {PERCEPTUAL_NETWORKS[network]}: {error}"
            ) from None

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Images and inpaintings (B, 3 or 1, H, W) -> (B,)."""
        measure = self._measure[0].to(x.device)
        distance = measure(x.expand(-1, 3, -1, -1), x_hat.expand(-1, 3, -1, -1))
        return torch.as_tensor(distance).flatten()


def _read(network: str, weights: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """The state dict of a file, or torchvision's own for that perceptual network."""
    from ..features.weights import read_state_dict

    if weights is not None:
        return read_state_dict(weights)

    from torchvision.models import get_model_weights

    name = PERCEPTUAL_NETWORKS[network]
    try:
        # torch reports the download on stdout, which is for rows of data
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = get_model_weights(name).DEFAULT.get_state_dict(progress=True)
    except Exception as error:  # urllib and torch.hub raise errors of many kinds
        raise WeightsError(
            f"the weights of {name}, which the distance lpips needs, could not be downloaded ({first_line(error)}): "
            "give a file as weights=FILE, or choose other distances: distances=mse,ssim"
        ) from None
    return state


class FeatureCosine(Distance):
    """1 - cosine similarity of a backbone's features, 0 to 2 (LMD does so with SimCLR's).

    Images are resized to the input size of the backbone.

    Parameters
    ----------
    extractor : FeatureExtractor
        Its last layer is compared. It is not part of the state.

    Attributes
    ----------
    fingerprint : str
        SHA-256 of the backbone's weights, in hex.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self._extractor = [extractor]  # in a list, so that its tensors are not part of the state
        config = extractor.backbone.data_config
        self.size = config["input_size"][-1]
        self.fingerprint = extractor.backbone.fingerprint
        self.mean = torch.tensor(config["mean"]).reshape(3, 1, 1)
        self.std = torch.tensor(config["std"]).reshape(3, 1, 1)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Images and inpaintings (B, 3 or 1, H, W) -> (B,)."""
        features = self._features(x)
        return mfsim(features, self._features(x_hat), [features.shape[1]])[:, 0]

    def _features(self, x: Tensor) -> Tensor:
        extractor = self._extractor[0]
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=self.size, mode="bicubic", antialias=True)
        pixels = (x.clamp(-1, 1) + 1) / 2
        rows: Tensor = extractor((pixels - self.mean.to(x)) / self.std.to(x))
        return rows[:, extractor.layout.layers[-1].columns]
