"""Bundles of random weights at the real sizes, to learn a model's speed before downloading it.

Exported without a checkpoint: parts are traced with random tensors, the decoder is written in
quantized form. What they answer is noise.
"""
