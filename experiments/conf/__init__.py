"""Settings of the studies, which `fedlora run experiment=NAME` finds."""
