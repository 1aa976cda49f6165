"""Regression runs: whether a candidate is worse than a baseline, on the same questions, in numbers that hold.

Modules that know neither pytest nor torch, the first five from the lowest up:

* `statistics`: `PairedMeans` for scores of any size and `PairedProportions` for scores of 0 and 1; both give an
  `Interval`, the shift that they would see (``detectable``), and how many questions would see another (``needed``).
* `questions`: `Questions` checks what is asked and has a view answer it (``scored_by``): nats of the answer for a
  pair, nats per token for a text, or what the user's own ``score`` says. Equal prompts are one cluster (``clusters``).
* `comparison`: `compare` makes a `Comparison` of both sides' scores: the plain numbers that a test asserts, with a
  `Row` for each question. ``verdict`` says what it shows of a `Claim`, ``report`` is what a failing test shows of it.
* `records`: a `Record` holds what was scored once; ``rows_of`` gives the baseline's scores where no baseline is named.
* `record_file`: ``encode`` makes the text of a file of records, ``decode`` reads it and refuses what it has not made.
* `divergence`: the divergence of two next-token distributions, for `pytest_sway.scores`.

One comparison goes one way::

    sway_compare(questions, candidate, baseline) -> the two sides' views are opened (pytest_sway.run.regression)
      -> Questions.scored_by(view), once for each side -> compare(...) -> rows -> clusters -> PairedMeans or
      PairedProportions -> Interval -> Comparison -> the test's asserts -> its report, and the run's table
"""
