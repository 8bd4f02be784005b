"""What the tests of this room share."""

from tests.helpers.buckets import implementation

__all__ = ["implementation"]
