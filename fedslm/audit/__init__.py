"""Audits for the privacy officer: checks ledgers and runs without trust in server or nodes."""
