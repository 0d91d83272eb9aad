"""What can be believed of an ablation's differences."""
