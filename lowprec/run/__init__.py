"""A run, from the command line to summary.json: ``stages`` tells it in order. Importing this package imports no torch."""
