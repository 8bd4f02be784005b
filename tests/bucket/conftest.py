"""What the tests of this room share."""

from tests.helpers.buckets import implementation, interpreter

__all__ = ["implementation", "interpreter"]
