"""All that waits for an NVIDIA GPU, in one command: `./invoke gpu-check`."""
