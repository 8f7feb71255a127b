"""Who decides the pools' sizes in a simulation: ours, baselines, and those who know the future."""
