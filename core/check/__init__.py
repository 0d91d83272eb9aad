"""What checks the lab itself: parity, speed, this machine."""
