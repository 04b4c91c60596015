"""Vision towers and connectors as ONNX: traced, stored, quantized."""
