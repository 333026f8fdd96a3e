"""The model repository: config.pbtxt, manifest, atomic publish, and the CPU backend."""
