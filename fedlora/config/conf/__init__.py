"""The configuration groups of `fedlora run`, one folder each."""
