"""Training a compressed model: losses, recipes, checkpoints, refinement."""
