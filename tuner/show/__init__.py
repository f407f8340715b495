"""Everything that shows a study: the terminal, JSON lines, and the page in optuna-dashboard. Imports no torch."""
