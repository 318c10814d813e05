"""Formats of KV pages: how the keys and values of a closed page are kept."""
