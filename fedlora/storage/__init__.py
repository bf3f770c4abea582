"""Files on disk: the folder of a run, checkpoints, the state of clients, and the log of updates."""
