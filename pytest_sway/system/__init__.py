"""The process and the machine that it runs on: locks, forks, files, secrets. Imports nothing of the other rooms."""
