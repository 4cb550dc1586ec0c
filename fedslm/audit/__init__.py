"""For the privacy officer: ledgers and runs, checked by somebody who trusts neither server nor node."""
