"""Several runs side by side: stages that build on each other, and methods with their baselines."""
