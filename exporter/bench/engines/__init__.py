"""What runs a model in a worker process: one file each, which imports nothing of ours but for our own runners."""
