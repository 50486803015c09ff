"""Enfilade: labels, metric depth and a completed 3-D room from one image."""

__version__ = "0.1.0"
