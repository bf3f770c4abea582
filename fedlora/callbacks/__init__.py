"""What watches a run and shows it."""
