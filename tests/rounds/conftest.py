"""A server loop and clients without a model, and messages without a server."""

from message_lab import respond, wire
from server_lab import identity, lab, noise
