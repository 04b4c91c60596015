"""The files of published checkpoints beside their weights, as far as they are known, by family."""
