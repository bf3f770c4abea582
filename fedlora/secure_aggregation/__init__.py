"""Secure aggregation: clients add masks that cancel in the sum, so that the server learns the sum only."""
