"""The only code that imports deepspeed."""
