"""Other libraries under metaopt: one module each, imported by name (``import metaopt.integrations.torchopt``)."""
