"""Records, budgets, files and other foundations that import nothing else of rankopt."""
