"""Data sets that are made on the spot: nothing is downloaded."""
