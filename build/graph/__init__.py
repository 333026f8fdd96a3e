"""Putting pixel front and SSDNMS around a source model, and typing it in a precision."""
