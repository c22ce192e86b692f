"""Statistics of a model on a text: collected layer by layer, kept, read again.

Methods ask for statistics; how they came about is known here alone."""
