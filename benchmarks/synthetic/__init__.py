"""Bundles of random weights at the real sizes, to learn a model's speed before downloading it.

Exported without a checkpoint: graphs are written with random weights, the decoder in quantized
form. What they answer is noise.
"""
