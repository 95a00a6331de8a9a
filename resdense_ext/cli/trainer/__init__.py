"""What `resdense train` consists of: data, network, loop, checkpoints, metrics, curves, processes."""
