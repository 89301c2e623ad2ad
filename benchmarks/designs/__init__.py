"""Designs of a sync, beside the one that was kept: capture and sync alone, without checks, hooks and state to save."""
