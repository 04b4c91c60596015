"""One file per family of models; a family is found by its file's name."""
