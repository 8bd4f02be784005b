"""Tools that serve tests and laboratories and know nothing of the product."""
