"""Reports of an ablation: page, pictures, words, live table."""
