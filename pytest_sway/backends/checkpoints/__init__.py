"""Files of models and adapters on disk, read without torch: so loading, checking and estimating agree."""
