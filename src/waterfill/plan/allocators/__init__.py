"""Ways to spend a budget, one file each; see `waterfill.plan.allocation`."""
