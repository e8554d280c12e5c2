"""Exported detectors without PyTorch: ONNX Runtime or OpenVINO alone. Start with :class:`ExportedDetector`.

Nothing here imports torch, timm, SciPy or scikit-learn. Besides one of the two engines it needs NumPy and Pillow; the
command line also needs click and rich.
"""

from .detector import ExportedDetector as ExportedDetector
