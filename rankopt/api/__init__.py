"""What Python users call: the functions and results of the package rankopt."""
