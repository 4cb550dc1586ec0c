"""Searches better settings for a private config on public records, under the noise of the real run.

The private records are never read, so nothing is charged. The result is about noise, and is not a
privacy promise: public records need none.
"""
