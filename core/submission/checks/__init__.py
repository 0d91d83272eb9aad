"""The fourteen checks of a submission folder, each with a verdict and its evidence."""
