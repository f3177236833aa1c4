"""Search strategies, and the exact allocation that they build on."""
