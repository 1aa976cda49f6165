"""Finds the field of a config that disagrees with the weights, and the value that would fit."""
