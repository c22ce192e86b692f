"""The tests, in the same rooms as what they test; oracle.py is float64 and shares no code with the package."""
