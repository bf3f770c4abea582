"""A server loop and clients without a model."""

from server_lab import identity, lab, noise
