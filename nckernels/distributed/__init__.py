"""Batches larger than one device takes at a time."""
