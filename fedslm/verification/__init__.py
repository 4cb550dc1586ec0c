"""Tests of the private path's guarantees."""
