"""What can be done with the folder of a run: export, verify, replay, look at its ledgers."""
