"""The language decoder on llama.cpp; nothing else in the runtime imports llama_cpp."""
