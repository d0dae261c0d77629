"""check-data: reports on datasets, and on what would stop or spoil a training run."""
