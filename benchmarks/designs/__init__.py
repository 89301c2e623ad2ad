"""Designs of a sync, beside the one that was kept: the mechanism alone, without checks, hooks and state to save."""
