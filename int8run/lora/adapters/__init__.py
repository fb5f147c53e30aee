"""The adapter types that LoRA files hold, one file for each; PEFT calls them tuners, LyCORIS modules."""
