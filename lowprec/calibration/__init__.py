"""What calibration and reconstruction share: the walk over the graph, statistics of channels, moments of inputs."""
