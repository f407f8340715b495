"""Promotion: the best trials confirmed on longer runs, the winner trained in full, its weights exported."""
