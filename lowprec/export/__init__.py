"""Files for other runtimes, written from the integer model alone."""
