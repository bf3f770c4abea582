"""From YAML and the command line to a checked configuration. Hydra's configuration is read here."""
