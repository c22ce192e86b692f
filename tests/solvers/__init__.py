"""Mathematics on tensors, each against something slower or exact."""
