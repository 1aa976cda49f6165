"""Read the files of models and adapters without torch, so that checks, estimates and loads agree."""
