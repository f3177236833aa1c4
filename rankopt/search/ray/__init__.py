"""Evaluating trials on Ray Tune."""
