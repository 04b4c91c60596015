"""Writers of tiny checkpoints in the published layouts."""
