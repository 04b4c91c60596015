"""Vision towers and connectors as ONNX: written, stored, quantized."""
