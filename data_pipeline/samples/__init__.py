"""Bytes -> one decoded sample."""
