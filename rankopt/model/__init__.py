"""A user's model: its layers, how it runs, and what it costs."""
