"""ONNX and torch.export files of fitted detectors, and their check."""
