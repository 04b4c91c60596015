"""Back ends that are not installed by default, compared with the CPU on this machine."""
