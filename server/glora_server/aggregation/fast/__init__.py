"""`accuracy="fast"` of the strategy glora: an objective within 1 % of the exact one, for a fraction of the work.

`intake` reads the uploads once and keeps small cores (`cores`), `operator` applies K to a few columns, `span` finds its
leading eigenvectors, `survey` measures the round, `fold` puts them together. None of these cares where factors lie:
`devices` has them as they came, one module at a time, and `stacked` side by side, many modules at once.
"""
