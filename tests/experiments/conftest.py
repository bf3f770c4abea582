"""A working folder and a cache of their own."""

from command_lab import isolated
