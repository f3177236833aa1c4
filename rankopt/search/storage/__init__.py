"""Studies on disk and in shared databases."""
