"""The parts of the training and validation scripts."""
