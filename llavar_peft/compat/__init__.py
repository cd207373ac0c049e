"""Private or unstable parts of other libraries that have no public equivalent.

This is the only place that touches them. Each entry states what it replaces and since which version it is needed, and
has a test in ``tests/compat`` that fails when the other library changes.
"""
