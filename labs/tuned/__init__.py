"""What fine-tuning loses: a real model, full and LoRA, islands beside dense training."""
