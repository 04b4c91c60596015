"""Language decoders as GGUF: written, quantized with an importance matrix."""
