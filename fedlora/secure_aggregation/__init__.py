"""Sums of updates under masks that cancel, so that the server sees the sum alone."""
