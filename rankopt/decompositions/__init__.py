"""Tensor decompositions, the modules that replace layers, and plans."""
