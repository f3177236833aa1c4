"""Experiments described by TOML files: single searches, lists of cases and tuned hyperparameters; built-in tasks."""
