"""Serving a model over HTTP. Requires the `serve` extra."""
