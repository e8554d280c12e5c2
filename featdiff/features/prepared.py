"""A backbone's forward pass on disk, so that a few images are scored without building the network.

Building it needs timm, which imports torchvision and with it PyTorch's compiler: that takes longer than importing
PyTorch. A pass is traced once for each model and machine. It is used for those sizes of images for which it gave, bit
by bit, what the network gives; for all others the network is built.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ModelError
from ..files.atomic import write_atomically
from ..files.sealed import drop_damaged, read_sealed, write_sealed
from ..files.strict_json import parse_json
from .backbones import Backbone
from .engines import TORCH, Traced
from .extractor import FEATURE_VERSION, FeatureExtractor
from .layout import FeatureLayout, Key, Kind
from .networks import fingerprint
from .views import PictureTransform

#: Folder of the cache.
FOLDER = "passes"
# Raised when what is kept changes.
_VERSION = 1
_FACTS = "facts.json"
# Sizes of images that one process adds; each takes two passes of one image.
_NEW_SIZES = 4
# Entries of a preprocessing that JSON turns into lists.
_TUPLES = ("input_size", "mean", "std")

# One thread at a time: others go on without adding anything.
_adding = threading.Lock()


def pass_key(facts: Mapping[str, Any]) -> str:
    """A short hash of all that decides a pass: the facts, and the libraries that built the network.

    Parameters
    ----------
    facts : mapping
        Anything that JSON can hold.

    Returns
    -------
    str
        Name of its folder below ``passes``.
    """
    libraries = [_VERSION, FEATURE_VERSION, torch.__version__, version("timm")]
    return hashlib.sha256(json.dumps([libraries, facts], sort_keys=True, default=str).encode()).hexdigest()[:16]


class PreparedExtractor(FeatureExtractor):
    """An extractor that builds its network when somebody needs it, and knows some passes without it.

    Parameters
    ----------
    folder : Path
        Where its pass is kept. It need not exist, nor be writable.
    weights : str
        Fingerprint that the pass must have; one with another is not used.
    build : callable
        Builds the extractor that this one stands for, on the CPU.

    Attributes
    ----------
    is_built : bool
        Whether the network is there.
    """

    def __init__(self, folder: Path, weights: str, build: Callable[[], FeatureExtractor]) -> None:
        self._folder = folder
        self._build = build
        self._pass: Any = None
        self._pass_keys: list[Key] = []
        self._sizes: set[str] = set()
        self._new_sizes = _NEW_SIZES

        data = self._read_pass()
        if data is not None:
            with contextlib.suppress(Exception):  # this PyTorch may not be able to read it
                self._take_pass(data, weights)
        if self._pass is None:
            vars(self).update(vars(build()))

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._folder.name}.pt"  # the checksum covers the name, and so the key

    def _size_files(self) -> list[Path]:
        """Empty files named after the sizes for which the pass is right."""
        return list(self._folder.glob("*x*x*"))

    def _read_pass(self) -> bytes | None:
        """The bytes of the pass; None if there is none."""
        try:
            return read_sealed(self._file)
        except OSError:
            return None
        except ValueError:
            drop_damaged(self._file, [*self._size_files(), self._file], "the backbone is built instead")
            return None

    def _take_pass(self, data: bytes, weights: str) -> None:
        """Be what the extractor was when its pass was traced, if that has these weights."""
        script, facts = _unpack(data)
        if fingerprint(script.network) != weights:
            return
        config = {key: tuple(value) if key in _TUPLES else value for key, value in facts["data_config"].items()}
        self.backbone = _Unbuilt(self, facts["tag"], facts["source"], weights, config)
        self._pass_keys = [(layer, Kind(kind)) for layer, kind in facts["keys"]]
        self._keys = [(layer, Kind(kind)) for layer, kind in facts["row"]]
        self._pass_maps = dict(facts["maps"])

        self._given_device = torch.device("cpu")
        self._autocast = None
        self._kept_in = None
        self.layers = tuple(facts["layers"])
        self.layout = FeatureLayout.from_json(facts["layout"])
        self.maps = {}
        self._logits = False
        self._local = None
        self._local_key = ""
        self._engine = None
        self._engine_weights = []
        self._sizes = {file.name for file in self._size_files()}
        self._pass = script

    @property
    def is_built(self) -> bool:
        """Whether the network is there."""
        return "model" in vars(self)

    def __getattr__(self, name: str) -> Any:
        """Build the network when it is asked for."""
        if name not in ("model", "_reader") or "_build" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        built = self._build()
        if built.backbone.fingerprint != self.backbone.fingerprint:
            raise ModelError(f"the backbone {self.backbone.tag} has other weights than this detector was fitted with")
        if self.maps:
            built.keep_maps(list(self.maps))
        self.backbone = built.backbone
        self.model = built.model
        self._reader = built._reader
        return vars(self)[name]

    def __getstate__(self) -> dict[str, Any]:
        """Copies build their own network and keep nothing: an exporter traces them, and must not be asked for sizes."""
        return super().__getstate__() | {"_pass": None, "_new_sizes": 0}

    @property
    def device(self) -> torch.device:
        """Where the network is now."""
        return super().device if self.is_built else self._given_device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's weights, and so of its images."""
        return super().dtype if self.is_built else torch.float32

    def keep_maps(self, names: Sequence[str] = ()) -> dict[str, int]:
        """From now on, read these maps in the same pass."""
        if self.is_built or list(names) != list(self._pass_maps):
            return super().keep_maps(names)
        self.maps = dict(self._pass_maps)
        return self.maps

    # ---- passes ----

    def with_heat(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows, and where images are strange, from one pass; the size of the images is known the next time."""
        result = super().with_heat(pixels)
        if self.is_built and self._new_sizes > 0 and _adding.acquire(blocking=False):
            try:
                self._add(pixels)
            finally:
                _adding.release()
        return result

    def _in_torch(self, pixels: Tensor) -> dict[Key, Tensor]:
        known = self._pass is not None and _name(pixels) in self._sizes
        if self.is_built or not known or self.precision != "float32":
            return super()._in_torch(pixels)
        return self._from_pass(pixels)

    @torch.inference_mode()
    def _from_pass(self, pixels: Tensor) -> dict[Key, Tensor]:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # it slows the first passes down
            values = self._pass(pixels)
        return dict(zip(self._pass_keys, values, strict=True))

    def _add(self, pixels: Tensor) -> None:
        """Keep that the pass is right for images of this size, if it is; trace it first where there is none."""
        size = _name(pixels)
        if size in self._sizes or self._new_sizes < 1 or not self._fits(TORCH) or self._engine is not None:
            return
        self._new_sizes -= 1
        try:
            with torch.inference_mode(False), torch.no_grad():
                image = pixels[:1].clone()
                if self._pass is None:
                    self._trace(image)
                expected = super()._in_torch(image)
                given = self._from_pass(image)
                if all(torch.equal(given[key], values.float()) for key, values in expected.items()):
                    self._sizes.add(size)
                    write_atomically(self._folder / size, b"")
        except Exception:  # tracers fail in many ways, and a cache need not be writable
            self._new_sizes = 0

    def _trace(self, image: Tensor) -> None:
        traced = Traced(self.model, super()._in_torch)
        self._pass_keys = list(super()._in_torch(image))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are compared, and that tracing will be replaced
            script = torch.jit.trace(traced, image.repeat(2, 1, 1, 1), check_trace=False)  # 1 would be a constant
            file = io.BytesIO()
            torch.jit.save(script, file, _extra_files={_FACTS: json.dumps(self._facts())})
        self._folder.mkdir(parents=True, exist_ok=True)
        for stale in self._size_files():
            stale.unlink(missing_ok=True)
        write_sealed(self._file, file.getvalue())
        self._pass = script

    def _facts(self) -> dict[str, Any]:
        """All of this extractor but its network."""
        backbone = self.backbone
        return {
            "tag": backbone.tag,
            "source": backbone.source,
            "data_config": backbone.data_config,
            "layers": self.layers,
            "layout": self.layout.without(Kind.LOCAL).to_json(),
            "maps": self.maps,
            "keys": self._pass_keys,
            "row": self._keys,
        }


class _Unbuilt(Backbone):
    """The backbone of an extractor whose network is not built before somebody asks for it."""

    def __init__(
        self, extractor: PreparedExtractor, tag: str, source: str, weights: str, config: dict[str, Any]
    ) -> None:
        facts = {"tag": tag, "source": source, "fingerprint": weights, "data_config": config}
        vars(self).update(facts, transform=PictureTransform(config), _extractor=extractor)

    def __getattr__(self, name: str) -> Any:
        if name != "model":
            raise AttributeError(f"a backbone has no attribute {name!r}")
        return vars(self)["_extractor"].model


def _unpack(data: bytes) -> tuple[Any, dict[str, Any]]:
    """A traced pass, and the facts beside it."""
    facts = {_FACTS: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that loading will be replaced
        script = torch.jit.load(io.BytesIO(data), map_location="cpu", _extra_files=facts)
    return script, parse_json(facts[_FACTS])


def _name(pixels: Tensor) -> str:
    """The size of images, as a name of a file."""
    return "x".join(str(int(side)) for side in pixels.shape[1:])
