"""What is computed: configuration, checkpoint reading, boundary operators, and the reference decoder in PyTorch."""
