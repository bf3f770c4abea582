"""The fedlora command: one file, one verb."""
