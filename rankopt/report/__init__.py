"""Results for people: text for the terminal, one HTML page."""
