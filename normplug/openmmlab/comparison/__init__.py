"""Two checkpoints side by side on the same data: metrics with their noise, cost, and what the norms are doing."""
