"""An exported model in place of a saved one: it is scored without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featdiff import ExportedDetector

# Options that make no sense without the saved model and PyTorch.
_REFUSED = {
    "cache": "--cache",
    "exclude_known": "--exclude-known",
    "figure": "--figure",
    "report": "--report",
    "weights": "--weights",
}
_READING = ("image_batch", "workers", "max_pixels", "max_bytes", "engine")


def open_exported(model: str, options: Mapping[str, Any]) -> ExportedDetector:
    """An exported model; ``UsageError`` for options that need the saved one."""
    from featdiff.exported import ExportedDetector

    return ExportedDetector(model, **exported_arguments(model, options))


def exported_arguments(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an exported model takes; ``UsageError`` for those that need the saved one."""
    from featdiff.exceptions import UsageError

    refused = [option for name, option in _REFUSED.items() if options.get(name)]
    if refused:
        given = ", ".join(refused)
        raise UsageError(f"{given}: {model} is an exported model, which cannot do that: give the saved one with -m")
    if options.get("device") not in (None, "auto", "cpu"):
        raise UsageError(f"{model} is an exported model, which runs on the CPU", argument="device")

    return {name: options[name] for name in _READING if options.get(name) is not None}


def describe(detector: ExportedDetector) -> dict[str, str]:
    """What an exported model is, a line each."""
    from featdiff.verdicts.calibration import smallest_rate

    facts = detector.facts
    size = detector.file.stat().st_size / 1e6
    made = f"format {facts['format_version']}, featdiff {facts['featdiff_version']}"
    count = len(detector.calibration_)
    groups = detector.calibration_.groups
    of_groups = f" in {groups:,} groups" if groups < count else ""
    _, height, width = facts["input_size"]

    return {
        "exported": f"{detector.file} ({size:.1f} MB, {made})",
        "runs in": f"{detector.engine}, without PyTorch",
        "backbone": f"{facts['backbone']}, SHA-256 {facts['backbone_fingerprint'][:16]}",
        "pictures": f"{facts['preprocessing'].get('crop_mode', 'own preprocessing')}, about {height} x {width} pixels",
        "layers": ", ".join(detector.layers),
        "local score": "part of the verdict" if detector.parts else "none",
        "calibrated": f"{count:,} held-out images{of_groups}; fpr {detector.fpr:g}, possible from "
        f"{smallest_rate(groups)} up",
    }
