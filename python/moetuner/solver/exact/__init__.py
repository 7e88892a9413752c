"""What finds the optimum by looking at everything."""
