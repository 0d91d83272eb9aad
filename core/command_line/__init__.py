"""The words of a command line: options and how they are spelled, short forms of settings, help."""
