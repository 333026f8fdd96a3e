"""What decides whether a model is published: pictures, parity, rows, repeatability, accuracy."""
