"""Calibration, Q/DQ placement, layer sensitivity, implicit calibration, audit."""
