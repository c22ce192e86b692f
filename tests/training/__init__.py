"""Training what is compressed: finetune, lora."""
