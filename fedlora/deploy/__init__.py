"""Runs over real sites: what Flower starts on their machines, and what sets them up."""
