"""What a model is made of, without torch: its config, its parameter shapes, and the device table."""
