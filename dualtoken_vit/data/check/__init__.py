"""Reports on datasets: what they hold, and what would stop or spoil a training run."""
