"""ONNX to TensorRT plan: engine build, plan runner, version differences, CUDA calls, the plugin's library."""
