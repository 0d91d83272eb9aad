"""Reports of an ablation: page, pictures, wording, live table."""
