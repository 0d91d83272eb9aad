"""What `import skc` gives: a trained model as an object, and the work of the program as functions."""
