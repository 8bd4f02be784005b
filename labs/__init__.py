"""Measurements of the product. Each laboratory drives the product's own classes."""
