"""Memory: what a spawn needs, what is promised, and the sizes that the plan and the engine share."""
