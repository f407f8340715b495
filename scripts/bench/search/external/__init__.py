"""Tools that search in environments of their own: data/environments/TOOL, with a script TOOL.py here.

A script runs in its tool's environment, with the method as its argument, and imports nothing of this project but
`client`. The two sides exchange lines of JSON; what the tool prints is ignored. First the search is
described to the script:

    {"batch_sizes": [2, 4], "d_coefs": [0.03, 3.0], "points": [512, 1024], "longest": 1024, "seed": 0,
     "baseline": {"batch_size": 2, "d_coef": 1.0}}

`d_coefs` are the ends of a range, `points` where losses are known, `longest` where a trial ends. All tools try the
baseline first. Then the script asks:

    {"config": {"batch_size": 2, "d_coef": 0.1}, "until": 1024}     answer: {"curve": [[512, 3.1], [1024, 2.9]]}
    {"promote": {"batch_size": 2, "d_coef": 0.1}}                   no answer

Asking again for a configuration continues its run, or costs nothing. Standard input ends when the budget is spent.
"""
