"""Language decoders as GGUF: written, weighed by an importance matrix, quantized."""
