"""Leaving rankopt: fusing layers, ONNX, torch.export and plain weights."""
