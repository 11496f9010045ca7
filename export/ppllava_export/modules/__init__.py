"""The torch modules that are traced; parameter names equal the checkpoint's tensor names."""
