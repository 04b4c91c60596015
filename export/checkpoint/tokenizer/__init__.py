"""A checkpoint's tokenizer as llama.cpp's vocabulary."""
