"""The dashboard; the rules are in ../helm/ssd-on-triton/files."""
