"""What the backends' pieces are held to, in numpy: ops, storage classes, optimizer rules. The model is the oracle's."""
