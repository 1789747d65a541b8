"""Accuracy on real photos, measured: data sets with fixed splits, one way to learn, and the studies that compare."""
