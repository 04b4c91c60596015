"""A bundle -> answers: onnxruntime for the picture, llama.cpp for the words."""
