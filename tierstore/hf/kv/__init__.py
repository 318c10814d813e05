"""transformers' KV cache over pages."""
