"""Rules against poisoned updates, between the clients and the strategy."""
