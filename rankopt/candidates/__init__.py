"""From a task to a priced menu of candidates for every layer."""
