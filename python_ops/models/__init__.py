"""What transformers' models are made of: their experts, routers, checkpoints, and the layer in the experts' place.

Knows transformers and no method."""
