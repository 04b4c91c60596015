"""aarch64, proven on x86-64: an arm64 user space under an emulator, llama.cpp cross-compiled."""
