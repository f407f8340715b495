"""The tuning service: `launch` a study, look at it, `promote` its best trial to the full run."""
