"""The three papers as tests: in float64, by formulas written from the papers, in loops where that is simpler."""
