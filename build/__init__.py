"""ONNX detector in, verified Triton model repository out: one file per stage, in the order of docs/design.md."""
