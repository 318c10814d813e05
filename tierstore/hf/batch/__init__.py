"""Generation for many sequences at once: every token of a pass is a row of its own, whatever sequence it is from."""
