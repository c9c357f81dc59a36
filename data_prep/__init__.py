"""Builders of data sets: one module a data set, importable and runnable as a script."""
