"""The server's side of a run: the loop over rounds, who takes part, messages and their checks."""
