"""The command in this process."""

from command_lab import finished, isolated, no_run, refused
