"""Making, applying and verifying deltas in the released format."""
