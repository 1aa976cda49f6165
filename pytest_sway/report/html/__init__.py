"""The page of ``--sway-html``: one file without scripts, made from the run record alone.

* `page`: converts the run record to HTML with the template `page.html.j2` and the styles `page.css`.
* `shown`: a comparison as the page shows it.
* `axes`, `timeline`: positions in the charts, for the template's inline SVG.
* `texts`: questions and their tokens as the page shows them.
* `words`: formatted numbers and sentences.

Charts are table cells, so that each drawn number also stands beside its chart.
"""
