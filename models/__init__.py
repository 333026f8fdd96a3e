"""Source models: each folder holds an ONNX with raw heads, its spec, labels, anchors and how it was made."""
