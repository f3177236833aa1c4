"""The job itself: propose, evaluate, keep, and build the result."""
