"""The three papers as tests: in float64, by formulas of their own, in loops where that is plainer."""
