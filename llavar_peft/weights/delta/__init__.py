"""The released delta format: make, apply and verify."""
