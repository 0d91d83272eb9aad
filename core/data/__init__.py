"""Text and tokens: prepared folders, shards, tokenizers, batches, and where published data comes from."""
