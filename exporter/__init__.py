"""How a checkpoint gets there: the command line, the pipeline, capture, lowering, weights and targets."""
