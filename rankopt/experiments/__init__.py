"""Experiments described by files: cases, hyperparameters, built-in tasks."""
