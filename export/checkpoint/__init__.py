"""A published checkpoint: where it is, its files, and which of its tensors is which."""
