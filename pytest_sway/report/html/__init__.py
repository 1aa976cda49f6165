"""The page of ``--sway-html``: one file without scripts, of the run record and nothing else.

* `page`: the run record in, HTML out; `page.html.j2` and `page.css` are its form.
* `shown`: a comparison as the page shows it.
* `axes`, `timeline`: where things stand in the charts, as numbers for the template's inline SVG.
* `texts`: what a question's text and its tokens are shown as.
* `words`: numbers and sentences.

Charts are cells of tables, so that each number that is drawn also stands beside it.
"""
