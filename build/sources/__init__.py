"""Other people's detectors to models/<name>/."""
