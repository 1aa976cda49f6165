"""Helpers around the process and its machine: locks, forks, files, secrets. Imports no other room."""
