"""What a run and its clients keep on disk."""
