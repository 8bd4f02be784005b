"""The exception tree. Knows nothing of the rest of the package.

::

    GradPruneError
    ├── ConfigError (ValueError)          the JSON block or a flag is wrong; lists every fault
    ├── UnsupportedError                  a DeepSpeed feature or version that we refuse by name
    ├── WireFormatError                   a payload is cut, flipped, foreign or of another version
    ├── TransportError                    the exchange failed
    │   └── TransportTimeout              no answer in time: names the operation and the seconds
    ├── RankMismatchError                 ranks differ in versions, model, decisions or parameters
    ├── NonFiniteError                    an island's weights hold inf or nan
    ├── CheckpointError                   per-rank state is missing, damaged or cannot be written
    ├── DataError (ValueError)            no text, too little text, an unreadable model folder
    └── MissingDependencyError (ImportError)   says the pip command

Scripts turn every `GradPruneError` into one line on stderr and exit code 2.
"""


class GradPruneError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(GradPruneError, ValueError):
    """What the user wrote is wrong.

    Args:
        faults: one sentence each, naming the field's full path, the rule, the value and the fix.

    Attributes:
        faults: the sentences, as a tuple, in the order of the fields.
    """

    def __init__(self, faults: list[str] | tuple[str, ...] | str) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        if len(self.faults) == 1:
            super().__init__(self.faults[0])
        else:
            listed = "\n".join(f"  - {fault}" for fault in self.faults)
            super().__init__(f"{len(self.faults)} faults in the configuration:\n{listed}")


class UnsupportedError(GradPruneError):
    """The engine uses something that gradient pruning does not support (yet)."""


class WireFormatError(GradPruneError):
    """Bytes from another rank are not a payload of ours."""


class TransportError(GradPruneError):
    """An exchange failed; nothing of it was applied, and the residual is as before."""


class TransportTimeout(TransportError):
    """An exchange had no answer in time."""


class RankMismatchError(GradPruneError):
    """Ranks that must agree do not."""


class NonFiniteError(GradPruneError):
    """An island's weights hold inf or nan and cannot be shared."""


class CheckpointError(GradPruneError):
    """The state beside DeepSpeed's checkpoint files cannot be used, or cannot be saved."""


class DataError(GradPruneError, ValueError):
    """Training text or a model folder cannot be used."""


class MissingDependencyError(GradPruneError, ImportError):
    """An optional package is absent; the message holds the pip command."""
