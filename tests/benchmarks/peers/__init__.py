"""Other engines that the benchmark runs beside ours, each in an environment of its own."""
