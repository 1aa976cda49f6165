"""Regression runs: paired statistics on whether a candidate is worse than a baseline on the same questions.

The modules know neither pytest nor torch. The first five are ordered from the lowest up:

* `statistics`: `evidence_of` handles scores of any size, `PairedProportions` handles scores of 0 and 1. Both compute a
  confidence `Interval`, the smallest ``detectable`` shift, and the sample size ``needed`` for a given shift.
* `questions`: `Questions` checks the questions and scores them on a view (``scored_by``): nats of the answer for a
  pair, nats per token for a text, or the user's own ``score``. Questions with equal prompts form one cluster.
* `comparison`: `compare` makes a `Comparison` of both sides' scores: plain numbers for a test to assert, and a `Row`
  for each question. ``verdict`` judges a `Claim`; ``report`` writes the lines that a failing test shows.
* `records`: a `Record` keeps the scores of one run; ``rows_of`` returns them in place of a baseline's.
* `record_file`: ``encode`` writes records as text; ``decode`` reads that text and refuses any other.
* `divergence`: the divergence of two next-token distributions, for `pytest_sway.scores`.

A comparison takes these steps::

    sway_compare(questions, candidate, baseline) -> opens the two sides' views (pytest_sway.run.regression)
      -> Questions.scored_by(view), once for each side -> compare(...) -> rows -> clusters -> evidence_of or
      PairedProportions -> Interval -> Comparison -> the test's asserts -> its report, and the run's table
"""
