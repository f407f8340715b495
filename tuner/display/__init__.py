"""What a person sees on a terminal, and a program on stdout, while it runs and afterwards. Imports no torch."""

from tuner.display.run import RunDisplay as RunDisplay
from tuner.display.study import StudyDisplay as StudyDisplay
from tuner.display.trial_table import format_params as format_params
from tuner.display.trial_table import format_value as format_value
from tuner.display.trial_table import is_rising as is_rising
from tuner.display.trial_table import trial_table as trial_table
