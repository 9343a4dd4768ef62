"""The doctor (where backprop fails, and why) and the planner (which remedy, at what cost). Empty for now."""
