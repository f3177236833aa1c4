"""Fusing layers for inference and exporting models: ONNX, torch.export and plain weights."""
