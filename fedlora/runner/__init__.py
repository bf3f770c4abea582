"""From the description of a run to its result."""
