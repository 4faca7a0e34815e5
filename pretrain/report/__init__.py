"""Runs as one HTML page for reading, mailing and printing: ``python -m pretrain.report RUN``.

Everything in a run's folder is taken for text that a stranger wrote and a crash may have cut: it is escaped, and what
cannot be read is said on the page. Imports neither torch nor anything else that takes seconds.
"""
