"""Data of a run: data sets, their splits and classes, loaders, and the order of images."""
