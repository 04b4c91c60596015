"""The vision encoder on onnxruntime: its graphs, execution providers, and the choice of one."""
