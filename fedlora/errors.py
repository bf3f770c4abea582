"""What can go wrong, as one small tree.

FedLoraError
├── ConfigError           a setting, or a pairing of settings, that cannot work
├── DataError             a file, a column, a row, a label or a partition
├── ModelError            a base model, its LoRA targets or its adapter files
│   └── ApartError        clients that this model cannot train in one pass
├── IncompatibleUpdates   client updates that a strategy cannot combine
├── CheckpointError       a run folder that cannot be continued or read
└── PrivacyError          private training that failed; says nothing of the rows

Every message says what was expected, what came, where, and what to do. The command line prints it as one
line and exits with code 2.
"""


class FedLoraError(Exception):
    """The root: catch this to catch everything that fedlora raises on purpose."""


class ConfigError(FedLoraError):
    """A setting, or a pairing of settings, that cannot work."""


class DataError(FedLoraError):
    """A file, a column, a row, a label or a partition that cannot be used."""


class ModelError(FedLoraError):
    """A base model, its LoRA targets or its adapter files cannot be used."""


class ApartError(ModelError):
    """Clients that this model cannot train in one pass, since a layer is not fed by row; each can alone."""


class IncompatibleUpdates(FedLoraError):
    """Client updates that a strategy cannot combine; names the client and the module."""


class CheckpointError(FedLoraError):
    """A run folder that cannot be continued or read."""


class PrivacyError(FedLoraError):
    """Private training that failed; says nothing of the rows."""
